"""The directory of a local store: nobody else's to read, free of links, and with one process that writes.

Large values are files in `blobs`, each written aside, flushed, and renamed when it is whole. Their names are made here.
"""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from unspool.errors import UserError
from unspool.store.interface import StoreCorrupt, StoreFull, StoreUnavailable

INDEX_NAME = "index.sqlite"
LOCK_NAME = "lock"
BLOBS_NAME = "blobs"
UNFINISHED = ".tmp"

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_directory(directory: Path, *, create: bool) -> Path:
    """The store's directory, which only its owner may enter; made if it is missing and `create`.

    Raises UserError when it cannot be made, or when it is another's or holds something else.
    """
    path = directory.expanduser().resolve()
    try:
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.scandir(path) as found:
            links = {entry.name: entry.is_symlink() for entry in found}
        names = links.keys()
        if INDEX_NAME not in names and names - {LOCK_NAME, BLOBS_NAME, "lost+found"}:
            raise UserError(f"{path} holds other files than a store's; pass an empty or a new directory")
        if not create and INDEX_NAME not in names:
            raise UserError(f"{path} holds no store; pass a directory that a server has kept sessions in")
        if link := next((name for name in sorted(links) if links[name]), None):
            raise UserError(f"{path / link} is a symbolic link, which could lead anywhere; put the file itself there")
        if create:
            path.chmod(0o700)
            (path / BLOBS_NAME).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; pass a directory that is yours") from error
    return path


def lock_for_writing(path: Path) -> int:
    """A descriptor that holds the directory for this process until it is closed, however the process ends.

    Raises UserError when another process writes there.
    """
    descriptor = os.open(path / LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{path} is being written to by another process; stop it, or pass another directory") from error
    return descriptor


def check_index_is_left(path: Path, lock: int) -> None:
    """Raises StoreCorrupt when the directory has had an index and has it no more: a new one would make every value an
    orphan, to be removed."""
    index = path / INDEX_NAME
    if os.fstat(lock).st_size and not (index.exists() and index.stat().st_size):
        raise StoreCorrupt(f"{index} is damaged (nothing is left); restore the directory from a copy or delete it")


def mark_used(lock: int) -> None:
    """Notes in the lock's file that the directory has an index."""
    os.pwrite(lock, b"used\n", 0)


class BlobFolder:
    """The large values. Not listed anywhere but in the index: a file that no row names is nobody's."""

    def __init__(self, directory: Path, *, fsync: bool) -> None:
        self._path = directory / BLOBS_NAME
        self._fsync = fsync
        try:
            self._folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StoreCorrupt(f"{self._path}: {error.strerror}; restore the directory from a copy") from error

    def write(self, value: memoryview) -> str:
        """Writes a value for good and returns its name. Raises StoreFull and StoreUnavailable, and leaves nothing."""
        name = secrets.token_hex(16)
        with self._failing():
            try:
                self._write_aside(name + UNFINISHED, value)
                os.rename(name + UNFINISHED, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                if self._fsync:
                    os.fsync(self._folder)
            except BaseException:
                self.remove(name + UNFINISHED)
                self.remove(name)
                raise
        return name

    def read(self, name: str, num_bytes: int) -> bytes | None:
        """A whole value; None if there is no such file. Raises StoreCorrupt when it is not as long as it was."""
        with self._failing():
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
            except FileNotFoundError:
                return None
            with open(descriptor, "rb", buffering=0) as file:
                if (found := os.fstat(descriptor).st_size) == num_bytes:
                    return file.readall()
        raise StoreCorrupt(f"{self._path / name}: {found} of {num_bytes} bytes are left; delete its key")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)

    def sweep(self, known: set[str]) -> None:
        """Removes what writers left behind that were killed. Only for the one writer, before it writes."""
        for name in os.listdir(self._folder):
            if name not in known:
                self.remove(name)

    def close(self) -> None:
        os.close(self._folder)

    def _write_aside(self, name: str, value: memoryview) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._folder)
        with open(descriptor, "wb", buffering=0) as file:
            written = 0
            while written < len(value):
                written += file.write(value[written:]) or 0
            if self._fsync:
                os.fsync(descriptor)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in NO_SPACE:
                raise StoreFull(f"{self._path}: {error.strerror}") from error
            raise StoreUnavailable(f"{self._path}: {error.strerror}") from error
