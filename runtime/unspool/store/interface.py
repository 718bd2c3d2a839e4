"""What keeps sessions outside the engine: immutable objects, heads that are swapped, and leases. Bytes only: it knows
no state, no session and no engine.

A key names one thing, an object or a head; leases are a space of their own. All methods may be called from any thread.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

Buffer = bytes | bytearray | memoryview

MAX_KEY_CHARACTERS = 200
MAX_HEAD_BYTES = 1 << 20
SMALL_BYTES = 1 << 16
"""Values up to this size may use the reserve, and a local store keeps them inside its index."""
RESERVED_SHARE = 16
"""One part in so many of a store's bytes is for small values only."""
MAX_LEASE_SECONDS = 86_400.0

_KEY = re.compile(r"[A-Za-z0-9._/-]+")


class InvalidKey(ValueError):
    """A key that no store accepts, or one that names a thing of another kind."""


class StoreUnavailable(RuntimeError):
    """The store went away; try again later. A write that raised it may have been done: read before repeating a swap."""


class StoreFull(RuntimeError):
    """The byte cap, or the disk or server behind it, has no room for a value. Nothing of it was kept."""


class StoreCorrupt(RuntimeError):
    """What is stored was damaged; the message names the file or key, and the remedy."""


class Entry(NamedTuple):
    """An object or head as listed."""

    key: str
    num_bytes: int
    """What it counts against the cap: its value, and for some stores a few bytes of their own."""
    created: float
    """When its present value was written, in seconds since 1970 (UTC)."""


class Head(NamedTuple):
    value: bytes
    version: int
    """Never the same for two values that the key has had, even if it was deleted in between."""


class Store(Protocol):
    """Every method raises InvalidKey for a malformed key and StoreUnavailable when the store cannot be reached."""

    def get(self, key: str) -> bytes | None:
        """An object's value; None if the key names none. Raises StoreCorrupt when only a part of it is left."""
        ...

    def put(self, key: str, value: Buffer) -> None:
        """Stores an immutable object: it is readable, whole, once this returns, and never in part. A key that is there
        already is taken to have the same value, and nothing is written.

        Raises StoreFull, and InvalidKey when the key names a head.
        """
        ...

    def delete(self, key: str) -> None:
        """Removes what the key names, and the key's lease record, whose epochs then start again. Absent is fine."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects and heads whose keys begin so, in the order of their keys, read in pages: what is written or deleted
        meanwhile may or may not appear."""
        ...

    def read_head(self, key: str) -> Head | None:
        """A head's value and version; None if the key names none."""
        ...

    def swap_head(
        self, key: str, expected: int | None, value: bytes | None, objects: Mapping[str, Buffer] | None = None
    ) -> int | None:
        """Writes a head if its version is still `expected` (None: there must be no head); no value deletes it. Returns
        the new version, or None when another came first.

        `objects`, immutable and best small, are readable at the latest when the head is. Of a swap that came second or
        failed they may stay behind. Raises StoreFull, InvalidKey when the key names an object or an object's key names
        a head, ValueError when the value is larger than MAX_HEAD_BYTES.
        """
        ...

    def lease(self, key: str, holder: str, seconds: float) -> int | None:
        """Takes or renews the key's lease for so long from now. Returns its epoch, a fencing number that grows by one
        with each change of holder; None when another holds it."""
        ...

    def release(self, key: str, holder: str) -> None:
        """Ends the holder's lease; another's is left alone."""
        ...

    def close(self) -> None:
        """Gives back connections and locks. Nothing else may be called afterwards; closing twice is fine."""
        ...


def check_key(key: str) -> None:
    """Raises InvalidKey unless the key is 1 to 200 of A-Z a-z 0-9 . _ / - with no empty, `.` or `..` segment."""
    if len(key) > MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
        raise InvalidKey(f"key: must be 1 to {MAX_KEY_CHARACTERS} characters of A-Z a-z 0-9 . _ / -")
    if any(segment in ("", ".", "..") for segment in key.split("/")):
        raise InvalidKey("key: must have no empty segment, and none that is . or ..")


def check_prefix(prefix: str) -> None:
    """Raises InvalidKey unless keys can begin so. The empty prefix is every key's."""
    if len(prefix) > MAX_KEY_CHARACTERS or (prefix and not _KEY.fullmatch(prefix)):
        raise InvalidKey(f"prefix: must be at most {MAX_KEY_CHARACTERS} characters of A-Z a-z 0-9 . _ / -")


def check_swap(key: str, value: bytes | None, objects: Mapping[str, Buffer] | None) -> dict[str, memoryview]:
    """The objects of a swap as bytes, not copied. Raises InvalidKey and ValueError."""
    check_key(key)
    if value is not None and len(value) > MAX_HEAD_BYTES:
        raise ValueError(f"value: {len(value)} bytes; at most {MAX_HEAD_BYTES}: put what is large into an object")
    views = {name: byte_view(data) for name, data in (objects or {}).items()}
    for name in views:
        check_key(name)
        if name == key:
            raise InvalidKey(f"{name}: cannot be the head and one of its objects")
    return views


def check_lease(key: str, holder: str, seconds: float) -> None:
    check_key(key)
    if not 1 <= len(holder) <= MAX_KEY_CHARACTERS:
        raise ValueError(f"holder: must be 1 to {MAX_KEY_CHARACTERS} characters")
    if not (math.isfinite(seconds) and 0 < seconds <= MAX_LEASE_SECONDS):
        raise ValueError(f"seconds: must be above 0 and at most {MAX_LEASE_SECONDS:g}")


def check_cap(max_bytes: int) -> None:
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: must be at least 1")


def byte_view(value: Buffer) -> memoryview:
    """The value as bytes, not copied."""
    return memoryview(value).cast("B")


def bytes_allowed(num_bytes: int, max_bytes: int) -> int:
    """How full a store may be once a value of this size is in it. Heads, turns and other small values stay writable
    when states have filled all that large values may have."""
    return max_bytes if num_bytes <= SMALL_BYTES else max_bytes - max_bytes // RESERVED_SHARE


def check_room(num_bytes: int, used: int, added: int, max_bytes: int) -> None:
    """Raises StoreFull unless a value of `num_bytes` may be written to a store with `used` bytes, which grows by
    `added` (less when it replaces another)."""
    if added > 0 and used + added > bytes_allowed(num_bytes, max_bytes):
        raise no_room(num_bytes, max_bytes)


def no_room(num_bytes: int, max_bytes: int) -> StoreFull:
    allowed = bytes_allowed(num_bytes, max_bytes)
    return StoreFull(f"no room for {num_bytes} bytes: values of this size may fill {allowed} of max_bytes={max_bytes}")


def names_head(key: str) -> InvalidKey:
    return InvalidKey(f"{key}: names a head, not an object")


def names_object(key: str) -> InvalidKey:
    return InvalidKey(f"{key}: names an object, not a head")
