"""What this machine has: processor, memory, graphics card, folders. What cannot be found out is no error."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from unspool.downloads import cache_directory

PROCESSORS = Path("/proc/cpuinfo")
MEMORY = Path("/proc/meminfo")
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
NO_LIMIT = 1 << 60
"""Control groups write a number near 2^63 where there is no limit."""


@dataclass(frozen=True)
class Processor:
    """`usable_cores`: those that this process may run on. `threads`: those that PyTorch and the kernels use."""

    model: str
    cores: int
    usable_cores: int
    threads: int


@dataclass(frozen=True)
class Memory:
    """Bytes. `limit`: of the container that this process is in."""

    total: int | None
    available: int | None
    limit: int | None


@dataclass(frozen=True)
class Device:
    """A graphics card, with its CUDA capability and bytes of memory."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Folder:
    """A folder that is made when it is needed, and the bytes free where it is or will be."""

    path: str
    exists: bool
    free: int | None


def find_processor() -> Processor:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = _field(PROCESSORS, "model name") or platform.processor() or platform.machine()
    return Processor(model, os.cpu_count() or 1, usable, torch.get_num_threads())


def find_memory() -> Memory:
    limits = [limit for file in MEMORY_LIMITS if (limit := _number(_text(file))) is not None and limit < NO_LIMIT]
    return Memory(_total_memory(), _kilobytes("MemAvailable"), min(limits, default=None))


def find_devices() -> list[Device]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Device(device.name, f"{device.major}.{device.minor}", device.total_memory) for device in properties]


def why_no_device() -> str:
    """Why PyTorch finds no graphics card, as far as it tells."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built for the CPU only"
    return f"PyTorch is built for CUDA {torch.version.cuda or torch.version.hip}, but finds no device or driver"


def find_folders() -> dict[str, Folder]:
    """Ours, and the hub's, where models that are named by a hub id come to lie."""
    return {"unspool": _folder(cache_directory()), "hub": _folder(Path(HF_HUB_CACHE))}


def _folder(path: Path) -> Folder:
    there = next((parent for parent in (path, *path.absolute().parents) if parent.is_dir()), None)
    try:
        free = None if there is None else shutil.disk_usage(there).free
    except OSError:  # a folder that this user may not look into
        free = None
    return Folder(str(path), path.is_dir(), free)


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # names that a system does not know
        return None


def _kilobytes(name: str) -> int | None:
    number = _number((_field(MEMORY, name) or "").removesuffix("kB").strip())
    return None if number is None else number * 1024


def _field(file: Path, name: str) -> str | None:
    """The first value of `name : value` in a file of the kernel's."""
    for line in _text(file).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # other systems, and containers that hide it
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None
