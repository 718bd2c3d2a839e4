"""What memory can do in this process, now: the bound that decoding is held against."""

import ctypes
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool_kernels.native.library import MAX_THREADS, Arguments, address, allocate, call

REPEATS = 3


class _Sweep(Arguments):
    function = "sweep"
    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("update", ctypes.c_int64),
        ("sink", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second: streaming read, and in-place read-modify-write (bytes read plus bytes written)."""

    read: float
    update: float

    def better(self, other: "Bandwidth") -> "Bandwidth":
        return Bandwidth(max(self.read, other.read), max(self.update, other.update))


class BandwidthMeter:
    """Sweeps a buffer of its own, larger than any cache, with the threads that PyTorch is set to."""

    def __init__(self, num_bytes: int = 256 << 20) -> None:
        self._memory: Tensor = allocate(num_bytes)
        self._memory.view(torch.float32).fill_(1.0)
        self._sink = torch.zeros(MAX_THREADS)

    def measure(self) -> Bandwidth:
        """The best of a few sweeps of each kind."""
        return Bandwidth(self._fastest(0), 2 * self._fastest(1))

    def _fastest(self, update: int) -> float:
        sweep = _Sweep(address(self._memory), self._memory.numel() // 4, update, address(self._sink))
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call(sweep)
            seconds.append(time.perf_counter() - start)
        return self._memory.numel() / min(seconds)
