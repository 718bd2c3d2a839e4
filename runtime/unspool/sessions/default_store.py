"""Where sessions are kept if nobody says otherwise: the server and the command must agree."""

import os
from pathlib import Path

from unspool.sizes import ByteSize

DEFAULT_STORE_BYTES = ByteSize(4 << 30)
DEFAULT_OWNER = "local"
"""Whose sessions are where nobody has a key."""


def default_store() -> Path:
    """`sessions` in UNSPOOL_HOME, else in `unspool` in XDG_DATA_HOME, else in ~/.local/share/unspool."""
    if own := os.environ.get("UNSPOOL_HOME"):
        return Path(own).expanduser() / "sessions"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "unspool" / "sessions"
