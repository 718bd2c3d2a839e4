"""What a machine can hold: the numbers that tile sizes must respect. Chooses nothing."""

import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

logger = logging.getLogger(__name__)

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CAUTIOUS_CACHE_BYTES = {1: 32 << 10, 2: 256 << 10, 3: 4 << 20}
"""By level, for machines that do not tell: found on nearly every processor of the last ten years."""
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
VECTORS = {"avx512": (32, 64), "avx2": (16, 32), "neon": (32, 16), "scalar": (16, 16)}
"""Registers and bytes of each, by instruction set as the native library names it."""


def require_positive(sizes: object) -> None:
    """Raises ValueError naming the first integer attribute that is less than one."""
    for name, value in vars(sizes).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{type(sizes).__name__}.{name}: must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class GpuLimits:
    """`shared_bytes`: dynamic shared memory that one block may opt in to."""

    multiprocessors: int
    shared_bytes: int
    registers_per_thread: int = 255
    registers_per_block: int = 65536
    threads_per_block: int = 1024

    def __post_init__(self) -> None:
        require_positive(self)


SM_80 = GpuLimits(multiprocessors=108, shared_bytes=163 << 10)
"""A100."""
SM_90 = GpuLimits(multiprocessors=132, shared_bytes=227 << 10)
"""H100 SXM, H200."""


@dataclass(frozen=True, kw_only=True)
class CpuLimits:
    """`threads` that may run at once; caches in bytes as one core sees them; vector registers of the kernels in use."""

    threads: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    vector_registers: int
    vector_bytes: int

    def __post_init__(self) -> None:
        require_positive(self)

    @classmethod
    def of_machine(cls, *, threads: int | None = None, instructions: str | None = None, caches: Path = CACHES) -> Self:
        """This machine's limits. `threads` and `instructions` (a key of VECTORS) override what is found.

        A cache that the system does not describe counts as small, with a line in the log. Raises ValueError for unknown
        instructions.
        """
        if instructions is None:
            instructions = _instruction_set()
        if instructions not in VECTORS:
            raise ValueError(f"instructions: {instructions!r} is not one of {', '.join(VECTORS)}")
        registers, vector_bytes = VECTORS[instructions]
        found = _cache_bytes(caches)
        for level in CAUTIOUS_CACHE_BYTES.keys() - found.keys():
            logger.info("%s tells no size of the level %d cache: tiles assume a small one", caches, level)
        sizes = CAUTIOUS_CACHE_BYTES | found
        return cls(
            threads=_usable_threads() if threads is None else threads,
            l1d_bytes=sizes[1],
            l2_bytes=sizes[2],
            l3_bytes=sizes[3],
            vector_registers=registers,
            vector_bytes=vector_bytes,
        )


def _usable_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _instruction_set() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX512", "AVX2"):
        return capability.lower()
    return "neon" if platform.machine() in ("aarch64", "arm64") else "scalar"


def _cache_bytes(caches: Path) -> dict[int, int]:
    """Bytes of the data caches by level, as far as the folder describes them."""
    found = {}
    for index in sorted(caches.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:  # containers and other systems hide these files
            continue
        digits, unit = size[:-1], UNITS.get(size[-1:])
        if kind in ("Data", "Unified") and level.isdigit() and digits.isdigit() and unit and int(digits):
            found[int(level)] = int(digits) * unit
    return found
