"""Where kernels are measured: memory for their operands, what it can do, and the time that a call takes."""

import math
import sys
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from unspool.bench.bandwidth import Bandwidth, BandwidthMeter
from unspool_kernels.contract import Backend
from unspool_kernels.native.library import allocate, instruction_set
from unspool_kernels.tiles import CpuLimits

CACHES = 4
"""Times the last cache, so that hardly anything of the last step is still there."""
KEPT_BYTES = 31 << 20
"""Of outputs and workspaces: the C allocator keeps such blocks for the next call once it has freed one of this size."""
SWEEP_PIECE = 1 << 16
"""The meter's buffer is whole pieces of so many bytes."""
GPU_SWEEPS = 5
CALLS_IN_A_ROW = 10
"""Launches that the GPU finds waiting, so that the time to launch one is hidden."""


class Machine(Protocol):
    """`num_bytes`: what the operands of a kernel take, by default more than its last cache has. `batch`: the most
    sequences that one call takes, where inputs and outputs are large beside the state."""

    name: str
    backend: Backend
    device: torch.device
    num_bytes: int
    batch: int

    def allocate(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor: ...

    def measure(self) -> Bandwidth:
        """What memory can do now."""

    def fastest(self, run: Callable[[], object], rounds: int) -> float:
        """Seconds of the fastest of some calls, after one that is not timed."""


class Cpu:
    """The native kernels' threads, on `num_bytes` of memory for the bound. Raises NativeUnavailable."""

    backend: Backend = "native"
    device = torch.device("cpu")
    batch = 256
    """So few that outputs lie where those of the last call lay, and not in pages that are new each time."""

    def __init__(self, num_bytes: int | None) -> None:
        self.name = f"{torch.get_num_threads()} threads, {instruction_set()}"
        self.num_bytes = CACHES * CpuLimits.of_machine().l3_bytes if num_bytes is None else num_bytes
        torch.empty(KEPT_BYTES, dtype=torch.uint8)  # freed at once: pages that are new at each call would be timed too
        self._meter = BandwidthMeter(-(-self.num_bytes // SWEEP_PIECE) * SWEEP_PIECE)

    def allocate(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def measure(self) -> Bandwidth:
        return self._meter.measure()

    def fastest(self, run: Callable[[], object], rounds: int) -> float:
        run()
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)


class Gpu:
    """The current CUDA device. Its bound, for all traffic, is a copy of memory onto itself."""

    backend: Backend = "triton"

    def __init__(self, num_bytes: int | None) -> None:
        self.device = torch.device("cuda")
        self.batch = sys.maxsize
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.num_bytes = CACHES * properties.L2_cache_size if num_bytes is None else num_bytes
        self._memory = self.allocate(-(-self.num_bytes // 4)).fill_(1.0)

    def allocate(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def measure(self) -> Bandwidth:
        memory = self._memory
        rate = 2 * memory.nbytes / self.fastest(lambda: torch.mul(memory, 0.999, out=memory), GPU_SWEEPS)
        return Bandwidth(read=rate, update=rate)

    def fastest(self, run: Callable[[], object], rounds: int) -> float:
        run()
        return min(self._seconds_of_one(run) for _ in range(rounds))

    def _seconds_of_one(self, run: Callable[[], object]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(CALLS_IN_A_ROW):
            run()
        last.record()
        last.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3 / CALLS_IN_A_ROW
