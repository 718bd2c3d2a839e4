"""The verb `doctor`: what is here, what is missing with its remedy, and whether a model can be served."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from unspool.bench.bandwidth import Bandwidth
from unspool.installation import (
    NativeLibrary,
    Need,
    find_backends,
    find_native,
    find_needs,
    find_version,
    measure_bandwidth,
    why_no_model_runs,
    why_no_server,
)
from unspool.machine import (
    Device,
    Folder,
    Memory,
    Processor,
    find_devices,
    find_folders,
    find_memory,
    find_processor,
    why_no_device,
)

SHOWN_VERSIONS = ("unspool", "torch", "transformers", "triton")

Lines = Iterator[tuple[str, str]]
"""Name and value of each line of the report; a line without a name continues the one above."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the report says. `problems`: why nothing can be served; none when it can."""

    python: str
    system: str
    versions: dict[str, str | None]
    processor: Processor
    memory: Memory
    native: NativeLibrary
    bandwidth: Bandwidth | None
    devices: list[Device]
    no_device: str | None
    backends: dict[str, dict[str, bool]]
    extras: dict[str, list[Need]]
    folders: dict[str, Folder]
    problems: list[str]


def add_doctor(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments and returns what runs it."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return run_doctor


def run_doctor(args: argparse.Namespace) -> int:
    """Exit code 0 when a model can be served, 1 with the reasons when not."""
    diagnosis = examine()
    sys.stdout.write(_json(diagnosis) if args.json else _text(diagnosis))
    return 1 if diagnosis.problems else 0


def examine() -> Diagnosis:
    """Looks at everything; measures the memory for about a second."""
    needs, devices = find_needs(), find_devices()
    return Diagnosis(
        python=f"{platform.python_version()} ({sys.executable})",
        system=platform.platform(),
        versions={name: find_version(name) for name in SHOWN_VERSIONS},
        processor=find_processor(),
        memory=find_memory(),
        native=find_native(),
        bandwidth=measure_bandwidth(),
        devices=devices,
        no_device=None if devices else why_no_device(),
        backends=find_backends(),
        extras={extra: required for extra, required in needs.items() if extra},
        folders=find_folders(),
        problems=list(_problems(needs[""])),
    )


def _problems(needs: list[Need]) -> Iterator[str]:
    if not needs:
        yield "unspool is not installed as a package: pip install ."
    for need in needs:
        if not need.satisfied:
            state = "is missing" if need.found is None else f"is {need.found}, which does not fit"
            yield f"{need.name} {state}: {need.command}"
    for reason in (why_no_model_runs(), why_no_server()):
        if reason is not None:
            yield reason


def _json(diagnosis: Diagnosis) -> str:
    record: dict[str, Any] = {"serves": not diagnosis.problems} | asdict(diagnosis)
    record["extras"] = {
        extra: [asdict(need) | {"command": need.command} for need in needs] for extra, needs in diagnosis.extras.items()
    }
    return json.dumps(record, indent=2) + "\n"


def _text(diagnosis: Diagnosis) -> str:
    lines = [
        *_versions(diagnosis),
        *_machine(diagnosis),
        *_kernels(diagnosis),
        *_extras(diagnosis.extras),
        *_folders(diagnosis.folders),
    ]
    if diagnosis.problems:
        lines += [("cannot serve" if i == 0 else "", problem) for i, problem in enumerate(diagnosis.problems)]
    else:
        lines.append(("can serve", "yes"))
    width = max(len(name) for name, _ in lines) + 2
    return "".join(f"{name:<{width}}{value}\n" for name, value in lines)


def _versions(diagnosis: Diagnosis) -> Lines:
    yield "python", diagnosis.python
    for name, found in diagnosis.versions.items():
        yield name, found or "not installed"
    yield "system", diagnosis.system


def _machine(diagnosis: Diagnosis) -> Lines:
    processor, memory = diagnosis.processor, diagnosis.memory
    yield "processor", processor.model
    yield "cores", f"{processor.cores}, of which {processor.usable_cores} may be used here"
    yield "threads", str(processor.threads)
    yield "memory", f"{_gigabytes(memory.total)}, {_gigabytes(memory.available)} of it available"
    if memory.limit is not None:
        yield "", f"this container may use {_gigabytes(memory.limit)}"
    if diagnosis.bandwidth is None:
        yield "bandwidth", "not measured: that needs the native library and 256 MB"
    else:
        read, update = diagnosis.bandwidth.read, diagnosis.bandwidth.update
        yield "bandwidth", f"reads {read / 1e9:.1f} GB/s, updates {update / 1e9:.1f} GB/s"
    for device in diagnosis.devices:
        yield "gpu", f"{device.name}, capability {device.capability}, {_gigabytes(device.memory)}"
    if diagnosis.no_device is not None:
        yield "gpu", f"no GPU: {diagnosis.no_device}"


def _kernels(diagnosis: Diagnosis) -> Lines:
    native = diagnosis.native
    if native.instruction_sets is None:
        yield "native kernels", f"none: {native.reason}"
        yield "", "models run on plain PyTorch, several times slower"
    else:
        built = ", ".join(name if runs else f"{name} (not here)" for name, runs in native.instruction_sets.items())
        yield "native kernels", f"{native.chosen}, built for {built}"
        yield "", str(native.file)
    for index, (family, backends) in enumerate(diagnosis.backends.items()):
        runs = ", ".join(backend for backend, there in backends.items() if there) or "reference only"
        yield "kernel families" if index == 0 else "", f"{family}: {runs}"


def _extras(extras: dict[str, list[Need]]) -> Lines:
    for extra, needs in extras.items():
        missing = [need for need in needs if not need.satisfied]
        yield f"extra {extra}", "complete" if not missing else f"lacks {', '.join(need.name for need in missing)}"
        if missing:
            yield "", "pip install " + " ".join(f"'{need.requirement}'" for need in missing)


def _folders(folders: dict[str, Folder]) -> Lines:
    for name, folder in folders.items():
        state = "" if folder.exists else ", not made yet"
        yield f"{name} cache", f"{folder.path}, {_gigabytes(folder.free)} free{state}"


def _gigabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"
