"""Where Unspool keeps what it downloads. Downloads nothing."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """UNSPOOL_CACHE, else `unspool` in XDG_CACHE_HOME, else ~/.cache/unspool."""
    if own := os.environ.get("UNSPOOL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "unspool"
