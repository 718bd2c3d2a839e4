"""A directory that appears whole or not at all: written beside its destination, then renamed into place."""

import ctypes
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unspool.errors import UserError
from unspool_conversion.reports import REPORT

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# How safetensors and tokenizers report one.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_SIDE_BYTES = 64 * 1024 * 1024
"""Room for tokenizer, configuration and reports."""

_log = logging.getLogger(__name__)


def check_destination(destination: Path, num_bytes: int, *, overwrite: bool) -> None:
    """Raises UserError when the destination exists and may not be replaced, or its disk has too little room."""
    if os.path.lexists(destination):
        if not overwrite:
            raise UserError(f"{destination} exists; choose another destination, or pass --overwrite")
        if not _replaceable(destination):
            raise UserError(
                f"{destination} is not a converted model, so --overwrite does not replace it; remove it yourself"
            )
    parent = _nearest_directory(destination)
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} is not writable; choose another destination")
    needed, free = num_bytes + _SIDE_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"the converted model needs {needed} bytes and {parent} has {free} bytes free; make room, "
            "choose another destination, or a smaller --dtype or --quant"
        )


@contextmanager
def staged_directory(destination: Path, num_bytes: int, *, overwrite: bool) -> Iterator[Path]:
    """A hidden directory beside the destination, which becomes the destination when the block ends.

    With `overwrite` it replaces a destination that `check_destination` lets it replace. Whatever ends the block early
    leaves nothing behind. Raises UserError when another destination appeared meanwhile, or the disk is full, naming
    the bytes that were needed.
    """
    created = _make_parents(destination.parent)
    staging = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that had our number before us
    try:
        staging.mkdir()
        yield staging
        _flush(staging)
        _move_into_place(staging, destination, overwrite=overwrite)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            for directory in created:
                directory.rmdir()
        if (reason := _out_of_space(error)) is not None:
            raise UserError(
                f"writing failed ({reason}): the converted model needs {num_bytes + _SIDE_BYTES} bytes in "
                f"{destination.absolute().parent}; make room or choose another destination"
            ) from error
        raise


def _out_of_space(error: BaseException) -> str | None:
    code = error.errno if isinstance(error, OSError) else None
    if match := _RUST_OS_ERROR.search(str(error)):
        code = int(match[1])
    return os.strerror(code) if code in _OUT_OF_SPACE else None


def _make_parents(parent: Path) -> list[Path]:
    """Creates missing directories; returns them, deepest first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir()
    return missing


def _nearest_directory(destination: Path) -> Path:
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{parent} is not a directory, so {destination} cannot be below it")
    return parent


def _replaceable(destination: Path) -> bool:
    if destination.is_symlink() or not destination.is_dir():
        return False
    return (destination / REPORT).is_file() or not any(destination.iterdir())


def _flush(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_into_place(staging: Path, destination: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(destination):
        _move_to_new(staging, destination)
    elif not (overwrite and _replaceable(destination)):
        raise _appeared(destination)
    elif _rename(staging, destination, _RENAME_EXCHANGE):
        shutil.rmtree(staging)
    else:
        _log.warning("this file system cannot exchange two directories; %s is gone for a moment", destination)
        _replace(staging, destination)


def _move_to_new(staging: Path, destination: Path) -> None:
    try:
        # A plain rename would take an empty directory's place.
        if not _rename(staging, destination, _RENAME_NOREPLACE):
            staging.rename(destination)
    except FileExistsError as error:
        raise _appeared(destination) from error


def _appeared(destination: Path) -> UserError:
    return UserError(f"{destination} appeared meanwhile, so nothing was written; choose another destination")


def _rename(first: Path, second: Path, flag: int) -> bool:
    """Renames in one step as the flag says. False where the system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _replace(staging: Path, destination: Path) -> None:
    old = destination.with_name(f"{staging.name}.old")
    destination.rename(old)
    try:
        staging.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old)
