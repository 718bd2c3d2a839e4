"""Compiles kernels for GPUs that need not be here, and tells what they take: registers, spills, shared memory.

`python -m unspool_kernels.triton.ahead_of_time` lists every shipped launch and fails if one spills.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool_kernels.tiles import SM_80, SM_90
from unspool_kernels.tiles.gpu import WARP
from unspool_kernels.triton.launch import Argument, Launch
from unspool_kernels.triton.shipped import shipped_calls

LIMITS = {80: SM_80, 90: SM_90}
"""By compute capability: A100, and H100 or H200."""
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
ALIGNMENT = 16
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a program of one launch takes: warps, registers and spilled bytes of each thread, bytes of shared memory;
    products counts the matrix products in its source, which are rounded as their precision says."""

    call: str
    kernel: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: int

    def __str__(self) -> str:
        use = f"{self.warps} warps, {self.registers} registers, {self.shared_bytes} bytes shared"
        return f"{self.target} {self.kernel} ({self.call}): {use}, {self.spilled_bytes} spilled"


def list_resources(capabilities: Iterable[int] = tuple(LIMITS)) -> Iterator[Resources]:
    """Compiles every launch of the shipped calls for each compute capability: minutes, unless Triton has it cached."""
    for capability in capabilities:
        for call in shipped_calls(LIMITS[capability]):
            for launch in call.launches:
                yield measure(call.name, launch, capability)


def measure(call: str, launch: Launch, capability: int) -> Resources:
    """Compiles one launch as the first run on that GPU would; `call` names what it is for.

    Raises RuntimeError where kernels are interpreted.
    """
    compiled = _compile(launch, capability)
    registers, spilled = _usage(compiled.asm["cubin"])
    return Resources(
        call=call,
        kernel=launch.kernel.__name__,
        target=f"sm_{capability}",
        warps=launch.warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        products=compiled.asm["ttir"].count("tt.dot"),
    )


class Specialization(NamedTuple):
    """What a kernel is compiled for: types and constants by argument, and attributes by its place."""

    types: dict[str, str]
    constants: dict[str, Argument]
    attributes: dict[tuple[int, ...], list[list[str | int]]]


def specialize(launch: Launch) -> Specialization:
    """As Triton's launcher does it: constants, None and 1 are compiled in, and so is what 16 divides."""
    found = Specialization({}, {}, {})
    for place, parameter in enumerate(launch.kernel.params):
        name, argument = parameter.name, launch.arguments[parameter.name]
        one = isinstance(argument, int) and argument == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or argument is None or one:
            found.types[name], found.constants[name] = "constexpr", argument
            continue
        found.types[name] = _type(argument)
        if not parameter.do_not_specialize and _is_aligned(argument):
            found.attributes[(place,)] = [["tt.divisibility", ALIGNMENT]]
    return found


def _is_aligned(argument: Argument) -> bool:
    """Tensors come from torch's allocator, which aligns them."""
    return isinstance(argument, Tensor) or (isinstance(argument, int) and argument % ALIGNMENT == 0)


def _type(argument: Argument) -> str:
    if isinstance(argument, Tensor):
        return f"*{TYPES[argument.dtype]}"
    if isinstance(argument, float):
        return "fp32"
    assert isinstance(argument, int)
    return "i32" if argument.bit_length() < 32 else "i64"


def _compile(launch: Launch, capability: int) -> Any:
    # Here, because at the top of the file a missing triton would be noticed before it is said how to install it.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    source = ASTSource(launch.kernel, *specialize(launch))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, GPUTarget("cuda", capability, WARP), options)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of each thread; a kernel has these only for spilled registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = USAGE.search(listing)
    assert found is not None, listing
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main() -> int:
    """Lists the resources of every shipped launch; 1 if any spills registers, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capabilities", type=int, nargs="*", help="compute capabilities, by default 80 and 90")
    chosen = parser.parse_args().capabilities or list(LIMITS)
    if unknown := set(chosen) - LIMITS.keys():
        parser.error(f"capabilities must be among {list(LIMITS)}, not {sorted(unknown)}")
    spilling = 0
    for found in list_resources(chosen):
        spilling += found.spilled_bytes > 0
        sys.stdout.write(f"{found}\n")
    sys.stdout.write(f"{spilling} launches spill registers\n")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
