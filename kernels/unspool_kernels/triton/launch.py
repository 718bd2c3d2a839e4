"""One launch of a kernel as a record, which runs on a GPU and compiles ahead of time for one that is not here."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

Argument = Tensor | int | float | str | None
"""Of a kernel: a tensor, None for one that is absent, a size or stride, or a setting that is compiled in."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """kernel[programs](**arguments) with `warps` warps to a program."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Argument]
    warps: int
    stages: int = 1

    def run(self) -> None:
        """Enqueues the kernel on its tensors' device, without waiting for it."""
        first = next(argument for argument in self.arguments.values() if isinstance(argument, Tensor))
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, num_warps=self.warps, num_stages=self.stages)


def bind(kernel: Any, pool: Mapping[str, Argument], *, programs: int, warps: int = 4) -> Launch:
    """A launch whose arguments are those of the pool that the kernel names; every one must be there."""
    arguments = {name: pool[name] for name in parameters(kernel)}
    return Launch(kernel=kernel, programs=programs, arguments=arguments, warps=warps)


@cache
def parameters(kernel: Any) -> tuple[str, ...]:
    """The names of a kernel's arguments, in order."""
    return tuple(signature(kernel.fn).parameters)


def run_all(launches: Iterable[Launch]) -> None:
    """Runs them in order, leaving out those with nothing to do."""
    for launch in launches:
        if launch.programs:
            launch.run()


def strided(name: str, tensor: Tensor | None, *axes: str) -> dict[str, Argument]:
    """The tensor as argument `name`, and the stride of each named leading axis as `name_axis`; 0 for what is absent."""
    strides = (tensor.stride(axis) if tensor is not None and axis < tensor.dim() else 0 for axis in range(len(axes)))
    return {name: tensor, **{f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}}


def search_steps(sequences: int) -> int:
    """Halvings that find one of so many sequences."""
    return sequences.bit_length()


def dot_precision(inputs: torch.dtype) -> Literal["tf32", "tf32x3"]:
    """How tensor cores multiply float32: half precisions fit tf32's digits, float32 needs three products."""
    return "tf32x3" if inputs == torch.float32 else "tf32"
