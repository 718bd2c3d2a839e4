"""A local directory in front of a shared store: states are read from where they are near."""

import logging
from collections.abc import Iterator, Mapping

from unspool.store.interface import Buffer, Entry, Head, Store, StoreCorrupt, StoreFull
from unspool.store.local import LocalStore

logger = logging.getLogger(__name__)

STATES = "states/"


class CachedStore:
    """The shared store decides everything; the directory holds copies of states, the latest that fit.

    A state's key says what it is, and its file is verified whenever it is read, so that a copy is never stale: what
    another process has deleted is at worst found here for a while.
    """

    def __init__(self, directory: LocalStore, shared: Store) -> None:
        self._directory = directory
        self._shared = shared

    def get(self, key: str) -> bytes | None:
        if not key.startswith(STATES):
            return self._shared.get(key)
        if (near := self._near(key)) is not None:
            return near
        value = self._shared.get(key)
        if value is not None:
            self._copy(key, value)
        return value

    def put(self, key: str, value: Buffer) -> None:
        self._shared.put(key, value)
        if key.startswith(STATES):
            self._copy(key, value)

    def delete(self, key: str) -> None:
        if key.startswith(STATES):
            self._directory.delete(key)
        self._shared.delete(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._shared.list(prefix)

    def read_head(self, key: str) -> Head | None:
        return self._shared.read_head(key)

    def swap_head(
        self, key: str, expected: int | None, value: bytes | None, objects: Mapping[str, Buffer] | None = None
    ) -> int | None:
        return self._shared.swap_head(key, expected, value, objects)

    def lease(self, key: str, holder: str, seconds: float) -> int | None:
        return self._shared.lease(key, holder, seconds)

    def release(self, key: str, holder: str) -> None:
        self._shared.release(key, holder)

    def close(self) -> None:
        self._directory.close()
        self._shared.close()

    def _near(self, key: str) -> bytes | None:
        try:
            return self._directory.get(key)
        except StoreCorrupt as error:
            logger.warning("a copy was dropped, the shared store has the state: %s", error)
            self._directory.delete(key)
            return None

    def _copy(self, key: str, value: Buffer) -> None:
        """Makes room by dropping the oldest copies; a state that fits nowhere is left to the shared store."""
        oldest_first: Iterator[Entry] | None = None
        while True:
            try:
                self._directory.put(key, value)
                return
            except StoreFull:
                if oldest_first is None:
                    copies = sorted(self._directory.list(STATES), key=lambda entry: entry.created)
                    oldest_first = iter(copies)
                if (oldest := next(oldest_first, None)) is None:
                    return
                self._directory.delete(oldest.key)
