"""A store in this process's memory: for tests, and where nothing need outlive the process."""

import threading
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from unspool.store.interface import (
    Buffer,
    Entry,
    Head,
    byte_view,
    check_cap,
    check_key,
    check_lease,
    check_prefix,
    check_room,
    check_swap,
    names_head,
    names_object,
)


class _Item(NamedTuple):
    value: bytes
    created: float
    version: int | None
    """None for an object."""


class _Lease(NamedTuple):
    holder: str
    epoch: int
    expires: float


class MemoryStore:
    """A dictionary under a lock."""

    def __init__(self, max_bytes: int) -> None:
        check_cap(max_bytes)
        self.max_bytes = max_bytes
        self._items: dict[str, _Item] = {}
        self._leases: dict[str, _Lease] = {}
        self._used = 0
        self._last_version = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        check_key(key)
        with self._lock:
            item = self._items.get(key)
        return item.value if item is not None and item.version is None else None

    def put(self, key: str, value: Buffer) -> None:
        check_key(key)
        with self._lock:
            if self._is_object(key):
                return
            size = byte_view(value).nbytes
            check_room(size, self._used, size, self.max_bytes)
            self._store(key, bytes(value), None)

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._discard(key)
            self._leases.pop(key, None)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        with self._lock:
            found = sorted((key, item) for key, item in self._items.items() if key.startswith(prefix))
        return (Entry(key, len(item.value), item.created) for key, item in found)

    def read_head(self, key: str) -> Head | None:
        check_key(key)
        with self._lock:
            item = self._items.get(key)
        return Head(item.value, item.version) if item is not None and item.version is not None else None

    def swap_head(
        self, key: str, expected: int | None, value: bytes | None, objects: Mapping[str, Buffer] | None = None
    ) -> int | None:
        views = check_swap(key, value, objects)
        with self._lock:
            old = self._items.get(key)
            if old is not None and old.version is None:
                raise names_object(key)
            if (old.version if old else None) != expected:
                return None
            new = {name: bytes(data) for name, data in views.items() if not self._is_object(name)}
            largest = max(map(len, [value or b"", *new.values()]))
            added = sum(map(len, new.values())) + len(value or b"") - (len(old.value) if old else 0)
            check_room(largest, self._used, added, self.max_bytes)
            for name, data in new.items():
                self._store(name, data, None)
            self._discard(key)
            self._last_version += 1
            if value is not None:
                self._store(key, bytes(value), self._last_version)
            return self._last_version

    def lease(self, key: str, holder: str, seconds: float) -> int | None:
        check_lease(key, holder, seconds)
        with self._lock:
            now = time.monotonic()
            held = self._leases.get(key, _Lease("", 0, 0.0))
            if held.holder != holder and held.expires > now:
                return None
            epoch = held.epoch + (held.holder != holder)
            self._leases[key] = _Lease(holder, epoch, now + seconds)
            return epoch

    def release(self, key: str, holder: str) -> None:
        check_key(key)
        with self._lock:
            held = self._leases.get(key)
            if held is not None and held.holder == holder:
                self._leases[key] = held._replace(expires=0.0)

    def close(self) -> None:
        """Nothing to give back."""

    def _is_object(self, key: str) -> bool:
        item = self._items.get(key)
        if item is not None and item.version is not None:
            raise names_head(key)
        return item is not None

    def _store(self, key: str, value: bytes, version: int | None) -> None:
        self._items[key] = _Item(value, time.time(), version)
        self._used += len(value)

    def _discard(self, key: str) -> None:
        item = self._items.pop(key, None)
        self._used -= len(item.value) if item is not None else 0
