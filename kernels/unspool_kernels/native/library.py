"""Loads the shared library and calls its functions. Knows no kernel: each module brings its own argument structure."""

import ctypes
import functools
import os
import sysconfig
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

FILE_NAME = "libunspool_native.dylib" if os.uname().sysname == "Darwin" else "libunspool_native.so"
LIBRARY_VARIABLE = "UNSPOOL_NATIVE_LIBRARY"
INSTRUCTION_SET_VARIABLE = "UNSPOOL_INSTRUCTION_SET"
MAX_THREADS = 255


class NativeUnavailable(RuntimeError):
    """The shared library is not there or does not fit this package; the message says which and what to do."""


class Arguments(ctypes.Structure):
    """Base of every function's arguments. Subclasses set `function` to its name."""

    function: str


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises NativeUnavailable."""
    places = [Path(__file__).parent, Path(sysconfig.get_path("platlib"), "unspool_kernels", "native")]
    candidates = [Path(os.environ[LIBRARY_VARIABLE])] if LIBRARY_VARIABLE in os.environ else []
    candidates += [place / FILE_NAME for place in places]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise NativeUnavailable(
            f"{FILE_NAME} is not in {places[0]}: this install was built without a C++ compiler; "
            "install one (Debian: apt-get install g++) and reinstall unspool"
        )
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise NativeUnavailable(f"{file} cannot be loaded ({error}); reinstall unspool on this machine") from error
    loaded.unspool_instruction_set.restype = ctypes.c_char_p
    loaded.unspool_built_for.restype = ctypes.c_char_p
    loaded.unspool_allocate.restype = ctypes.c_void_p
    loaded.unspool_allocate.argtypes = [ctypes.c_int64]
    loaded.unspool_release.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    if (wanted := os.environ.get(INSTRUCTION_SET_VARIABLE)) and not loaded.unspool_choose(wanted.encode()):
        raise NativeUnavailable(f"{INSTRUCTION_SET_VARIABLE}={wanted}: not built, or not on this machine")
    return loaded


def available() -> bool:
    """Whether the library loads here."""
    try:
        library()
    except NativeUnavailable:
        return False
    return True


def instruction_set() -> str:
    """The instruction set in use: avx512, avx2, neon or scalar."""
    name: bytes = library().unspool_instruction_set()
    return name.decode()


def instruction_sets() -> dict[str, bool]:
    """Those the library was built for, best first, and whether this machine has them."""
    found, index, runs = {}, 0, ctypes.c_int()
    while name := library().unspool_built_for(index, ctypes.byref(runs)):
        found[name.decode()] = bool(runs.value)
        index += 1
    return found


def choose_instruction_set(name: str) -> None:
    """Uses another instruction set in this process from now on. Raises ValueError if it cannot run here."""
    if not library().unspool_choose(name.encode()):
        raise ValueError(f"instruction_set={name!r} is not built or not on this machine")


Structure = TypeVar("Structure", bound=Arguments)


@functools.cache
def _function(structure: type[Arguments]) -> "ctypes._NamedFuncPointer":
    """The function that takes this structure, once both sides agree about its size."""
    function = getattr(library(), f"unspool_{structure.function}", None)
    if function is None:
        raise NativeUnavailable(
            f"the native library lacks {structure.function}: it is older than this package; reinstall"
        )
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.POINTER(structure), ctypes.c_int]
    size = getattr(library(), f"unspool_size_of_{structure.function}")
    size.restype = ctypes.c_int64
    if size() != ctypes.sizeof(structure):
        raise NativeUnavailable(f"the native library is of another version than this package ({structure.function})")
    found: ctypes._NamedFuncPointer = function
    return found


def num_threads(wanted: int | None = None) -> int:
    """The number wanted, or else PyTorch's, within what the library can have. Raises ValueError for less than 1."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"threads: must be at least 1, not {wanted}")
    return min(torch.get_num_threads() if wanted is None else wanted, MAX_THREADS)


def call(arguments: Arguments, threads: int | None = None) -> None:
    """Runs the arguments' function on `threads` threads (default: PyTorch's number). Other Python threads go on.

    Raises NativeUnavailable, and ValueError with what the library says of the arguments.
    """
    message: bytes | None = _function(type(arguments))(ctypes.byref(arguments), num_threads(threads))
    if message is not None:
        raise ValueError(f"{arguments.function}: {message.decode()}")


def address(tensor: Tensor | None) -> int | None:
    """A tensor's memory, or None for an absent one. The caller keeps the tensor alive during the call."""
    return None if tensor is None else tensor.data_ptr()


class _Allocation:
    """Memory of the library's, released with the last tensor on it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.address: int | None = library().unspool_allocate(num_bytes)
        if self.address is None:
            raise MemoryError(f"cannot allocate {num_bytes:,} bytes")
        self._release = library().unspool_release

    def __del__(self) -> None:
        if getattr(self, "address", None) is not None:
            self._release(self.address, self.num_bytes)


def allocate(num_bytes: int) -> Tensor:
    """Zeroed uint8 memory in huge pages where the system has them, for what every token sweeps. Raises MemoryError."""
    allocation = _Allocation(max(num_bytes, 1))
    assert allocation.address is not None
    array = (ctypes.c_uint8 * allocation.num_bytes).from_address(allocation.address)
    array._allocation = allocation  # type: ignore[attr-defined]  # the tensor keeps the array, the array its memory
    return torch.frombuffer(array, dtype=torch.uint8)[:num_bytes]
