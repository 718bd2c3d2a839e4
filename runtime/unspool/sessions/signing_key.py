"""The key that signs exported sessions, from a file: flags can be read in the list of processes."""

from pathlib import Path

from unspool.errors import UserError
from unspool.sessions.options import MAX_KEY_BYTES, MIN_KEY_BYTES


def read_signing_key(path: Path) -> bytes:
    """The file's bytes, any at all, without the newline at their end. Raises UserError."""
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY_BYTES + 3).removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise UserError(f"the signing key {path} cannot be read: {error.strerror}") from error
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise UserError(
            f"the signing key {path} must have {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes; "
            "make one with: openssl rand -hex 32"
        )
    return key
