"""API keys: where they are read from, and whether one is right. Holds only their digests."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from unspool.errors import UserError

ENVIRONMENT_KEY = "UNSPOOL_API_KEY"
MAX_KEY_FILE_BYTES = 1 << 20


class KeyRing:
    """The keys that open the server. Empty when it is open to all who can reach it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: bytes) -> str | None:
        """A name for whoever holds `key`, which tells nothing of it, or None when it is not one of the ring's; in a
        time that does not depend on which or how nearly."""
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return hashlib.sha256(b"owner:" + digest).hexdigest()[:32] if any(matches) else None


def read_keys(flags: list[str] | None, path: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of the flags, else of the file (one a line, # comments), else of UNSPOOL_API_KEY, else none.

    Raises UserError when a place that was named holds no key, so that a lost secret never opens the server.
    """
    if flags is not None:
        return _checked(flags, "--api-key")
    if path is not None:
        return _checked(_read_lines(path), f"--api-key-file {path}")
    if ENVIRONMENT_KEY in environment:
        return _checked([environment[ENVIRONMENT_KEY]], ENVIRONMENT_KEY)
    return ()


def _read_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_FILE_BYTES + 1)
        if len(content) > MAX_KEY_FILE_BYTES:
            raise UserError(f"--api-key-file {path} is larger than {MAX_KEY_FILE_BYTES} bytes; give one key a line")
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _checked(keys: list[str], place: str) -> tuple[str, ...]:
    if not keys:
        raise UserError(f"{place} holds no key; write one a line")
    if any(not key or key != key.strip() or not key.isascii() or not key.isprintable() for key in keys):
        raise UserError(f"{place}: a key must be printable ASCII, not empty, with no blank at either end")
    return tuple(keys)
