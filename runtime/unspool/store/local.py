"""A store in a local directory: an SQLite index that holds heads and small values, and a file for each large value.

A large value's file is whole and flushed before its row is committed, so at any instant that the process is killed,
each row has all its bytes; files without a row are removed when the directory is next opened for writing. One process
writes; others may read beside it.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from unspool.errors import UserError
from unspool.store.interface import (
    SMALL_BYTES,
    Buffer,
    Entry,
    Head,
    StoreCorrupt,
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
from unspool.store.local_files import (
    BLOBS_NAME,
    INDEX_NAME,
    BlobFolder,
    check_index_is_left,
    lock_for_writing,
    mark_used,
    open_directory,
)
from unspool.store.local_index import Index


class LocalStore:
    """`max_bytes` bounds the values; the index and the file system take some more for themselves.

    Without `fsync` a power failure, but no killed process, may lose what was last written. One that only reads refuses
    every write with UserError, needs no lock, and may be open beside a writer. Opening for writing ends all leases:
    whoever held them wrote here, and is gone.
    """

    def __init__(self, directory: Path, max_bytes: int, *, fsync: bool = True, read_only: bool = False) -> None:
        """Raises UserError when the directory cannot be used or another process writes there, StoreCorrupt when its
        index is damaged."""
        check_cap(max_bytes)
        self.max_bytes = max_bytes
        self.read_only = read_only
        self.path = open_directory(directory, create=not read_only)
        self._lock = threading.RLock()
        self._open = contextlib.ExitStack()
        try:
            lock = None if read_only else lock_for_writing(self.path)
            if lock is not None:
                self._open.callback(os.close, lock)
                check_index_is_left(self.path, lock)
            self._index = Index(self.path / INDEX_NAME, fsync=fsync, read_only=read_only)
            self._open.callback(self._index.close)
            self._blobs = BlobFolder(self.path, fsync=fsync)
            self._open.callback(self._blobs.close)
            self._used = self._index.num_bytes()
            if lock is not None:
                mark_used(lock)
                self._blobs.sweep(self._index.blobs())
                with self._transaction():
                    self._index.end_all_leases()
        except BaseException:
            self._open.close()
            raise

    def get(self, key: str) -> bytes | None:
        check_key(key)
        row = self._index.row(key)
        while row is not None and row.version is None and row.blob is not None:
            if (value := self._blobs.read(row.blob, row.num_bytes)) is not None:
                return value
            gone, row = row.blob, self._index.row(key)  # it may have been deleted since
            if row is not None and row.blob == gone:
                raise StoreCorrupt(f"{self.path / BLOBS_NAME / gone}: is missing; delete the key {key}")
        return row.value if row is not None and row.version is None else None

    def put(self, key: str, value: Buffer) -> None:
        check_key(key)
        view = byte_view(value)
        with self._lock:
            self._refuse_if_read_only()
            if self._is_object(key):
                return
            check_room(view.nbytes, self._used, view.nbytes, self.max_bytes)
            self._used += view.nbytes  # reserved: the file is written outside the lock
        blob, done = None, False
        try:
            blob = self._blobs.write(view) if view.nbytes > SMALL_BYTES else None
            with self._transaction():
                if new := not self._is_object(key):
                    self._index.insert(key, None, view, blob)
            done = new
        finally:
            if not done:
                with self._lock:
                    self._used -= view.nbytes
                if blob is not None:
                    self._blobs.remove(blob)

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            with self._transaction():
                row = self._index.row(key)
                self._index.remove(key)
                self._index.remove_lease(key)
            self._used -= row.num_bytes if row is not None else 0
        if row is not None and row.blob is not None:
            self._blobs.remove(row.blob)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        return self._index.entries(prefix)

    def read_head(self, key: str) -> Head | None:
        check_key(key)
        row = self._index.row(key)
        return Head(row.value or b"", row.version) if row is not None and row.version is not None else None

    def swap_head(
        self, key: str, expected: int | None, value: bytes | None, objects: Mapping[str, Buffer] | None = None
    ) -> int | None:
        views = check_swap(key, value, objects)
        for name, view in views.items():
            if view.nbytes > SMALL_BYTES:
                self.put(name, view)
        with self._lock:
            with self._transaction():
                old = self._index.row(key)
                if old is not None and old.version is None:
                    raise names_object(key)
                if (old.version if old else None) != expected:
                    return None
                new = {name: view for name, view in views.items() if not self._is_object(name)}
                sizes = [len(value or b""), *(view.nbytes for view in new.values())]
                added = sum(sizes) - (old.num_bytes if old else 0)
                check_room(max(sizes), self._used, added, self.max_bytes)
                for name, view in new.items():
                    self._index.insert(name, None, view, None)
                self._index.remove(key)
                version = self._index.next_version()
                if value is not None:
                    self._index.insert(key, version, byte_view(value), None)
            self._used += added
        return version

    def lease(self, key: str, holder: str, seconds: float) -> int | None:
        check_lease(key, holder, seconds)
        now = time.time()
        with self._transaction():
            held_by, epoch, expires = self._index.lease(key)
            if held_by != holder and expires > now:
                return None
            epoch += held_by != holder
            self._index.write_lease(key, holder, epoch, now + seconds)
        return epoch

    def release(self, key: str, holder: str) -> None:
        check_key(key)
        with self._transaction():
            self._index.end_lease(key, holder)

    def close(self) -> None:
        with self._lock:
            self._open.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._refuse_if_read_only()
        with self._lock, self._index.transaction():
            yield

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise UserError(f"{self.path} is open for reading only; stop the server that writes there, and try again")

    def _is_object(self, key: str) -> bool:
        row = self._index.row(key)
        if row is not None and row.version is not None:
            raise names_head(key)
        return row is not None
