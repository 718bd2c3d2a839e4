"""The SQLite index of a local store: what each key names, its value if that is small, leases and the last version."""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unspool.errors import UserError
from unspool.store.interface import Entry, StoreCorrupt, StoreFull, StoreUnavailable

APPLICATION_ID = 0x756E7370
SCHEMA_VERSION = 1
PAGE_ENTRIES = 512
BUSY_SECONDS = 10.0

SCHEMA = (
    # An object has no version. A value is in its row, or in the file that `blob` names.
    "CREATE TABLE entries (key TEXT PRIMARY KEY, version INTEGER, num_bytes INTEGER NOT NULL, created REAL NOT NULL,"
    " blob TEXT, value BLOB)",
    "CREATE TABLE leases (key TEXT PRIMARY KEY, holder TEXT NOT NULL, epoch INTEGER NOT NULL, expires REAL NOT NULL)",
    "CREATE TABLE versions (last INTEGER NOT NULL)",
    "INSERT INTO versions VALUES (0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: a table is missing
NO_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)


class Row(NamedTuple):
    version: int | None
    """None for an object."""
    num_bytes: int
    blob: str | None
    value: bytes | None


class Index:
    """One connection, which threads take turns at. Raises StoreFull, StoreCorrupt and StoreUnavailable."""

    def __init__(self, file: Path, *, fsync: bool, read_only: bool) -> None:
        self.file = file
        self.read_only = read_only
        self._lock = threading.RLock()
        with self._failing():
            self._connection = self._connect(fsync)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written inside is written whole or, when it raises, not at all."""
        with self._lock, self._failing():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself has rolled back when the disk is full
                    self._connection.execute("ROLLBACK")
                raise

    def row(self, key: str) -> Row | None:
        row = self._one("SELECT version, num_bytes, blob, value FROM entries WHERE key = ?", key)
        return Row(*row) if row is not None else None

    def insert(self, key: str, version: int | None, view: memoryview, blob: str | None) -> None:
        self._connection.execute(
            "INSERT INTO entries (key, version, num_bytes, created, blob, value) VALUES (?, ?, ?, ?, ?, ?)",
            (key, version, view.nbytes, time.time(), blob, view if blob is None else None),
        )

    def remove(self, key: str) -> None:
        self._connection.execute("DELETE FROM entries WHERE key = ?", (key,))

    def next_version(self) -> int:
        ((version,),) = self._connection.execute("UPDATE versions SET last = last + 1 RETURNING last").fetchall()
        return int(version)

    def lease(self, key: str) -> tuple[str, int, float]:
        """Holder, epoch and end; of a lease that nobody ever had, an epoch of 0."""
        holder, epoch, expires = self._one("SELECT holder, epoch, expires FROM leases WHERE key = ?", key) or ("", 0, 0)
        return holder, epoch, expires

    def write_lease(self, key: str, holder: str, epoch: int, expires: float) -> None:
        self._connection.execute("REPLACE INTO leases VALUES (?, ?, ?, ?)", (key, holder, epoch, expires))

    def end_lease(self, key: str, holder: str) -> None:
        self._connection.execute("UPDATE leases SET expires = 0 WHERE key = ? AND holder = ?", (key, holder))

    def end_all_leases(self) -> None:
        self._connection.execute("UPDATE leases SET expires = 0")

    def remove_lease(self, key: str) -> None:
        self._connection.execute("DELETE FROM leases WHERE key = ?", (key,))

    def entries(self, prefix: str) -> Iterator[Entry]:
        last, end = prefix, prefix + "\x7f"  # which comes after every character of a key
        comparison = ">="
        while True:
            with self._lock, self._failing():
                page = self._connection.execute(
                    f"SELECT key, num_bytes, created FROM entries WHERE key {comparison} ? AND key < ?"
                    f" ORDER BY key LIMIT {PAGE_ENTRIES}",
                    (last, end),
                ).fetchall()
            yield from (Entry(*row) for row in page)
            if len(page) < PAGE_ENTRIES:
                return
            last, comparison = page[-1][0], ">"

    def num_bytes(self) -> int:
        """Bytes of all values."""
        with self._lock, self._failing():
            ((total,),) = self._connection.execute("SELECT coalesce(sum(num_bytes), 0) FROM entries").fetchall()
        return int(total)

    def blobs(self) -> set[str]:
        """The files that rows name."""
        with self._lock, self._failing():
            rows = self._connection.execute("SELECT blob FROM entries WHERE blob IS NOT NULL").fetchall()
        return {name for (name,) in rows}

    def _one(self, query: str, key: str) -> tuple[Any, ...] | None:
        with self._lock, self._failing():
            row: tuple[Any, ...] | None = self._connection.execute(query, (key,)).fetchone()
        return row

    def _connect(self, fsync: bool) -> sqlite3.Connection:
        if not self.read_only:  # made here because SQLite would let everyone read it, and its companions have its mode
            os.close(os.open(self.file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            f"{self.file.as_uri()}?mode={'ro' if self.read_only else 'rw'}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            if not self.read_only:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'NORMAL'}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self) -> None:
        if not self.read_only and self._pragma("user_version") == 0:
            with self.transaction():
                for statement in SCHEMA:
                    self._connection.execute(statement)
        if (self._pragma("application_id"), self._pragma("user_version")) != (APPLICATION_ID, SCHEMA_VERSION):
            raise UserError(f"{self.file} is no index of this release's; pass another directory")

    def _pragma(self, name: str) -> int:
        ((value,),) = self._connection.execute(f"PRAGMA {name}").fetchall()
        return int(value)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Gives SQLite's errors their types."""
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise StoreUnavailable(f"{self.file}: the store is closed") from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            if code in NO_SPACE:
                raise StoreFull(f"{self.file}: the disk takes no more, or its quota is used up ({error})") from error
            if code & 0xFF in DAMAGE:
                remedy = "stop the server, restore the directory from a copy or delete it"
                raise StoreCorrupt(f"{self.file} is damaged ({error}); {remedy}") from error
            raise StoreUnavailable(f"{self.file}: {error}") from error
