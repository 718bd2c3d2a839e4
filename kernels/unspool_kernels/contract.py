"""What the ops share: the row kernel's descriptor, the checks of a call's arguments, and the choice of a backend.

A call has N packed tokens in S sequences: sequence s owns tokens cu_seqlens[s]..cu_seqlens[s + 1] and keeps its state
in row slots[s] of every state tensor (-1: a padding sequence, which reads nothing, writes nothing and gives zeros).
A backend is a package `unspool_kernels.<backend>` with modules named like those of `ops`, whose functions take the ops'
arguments without `backend` and `check`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from unspool_kernels import triton
from unspool_kernels.native.library import NativeUnavailable, library

Backend = Literal["auto", "reference", "native", "triton"]

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STATE_DTYPES = (torch.float32, torch.float16, torch.float64)


class BackendMissing(RuntimeError):
    """The backend a caller named cannot run here; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class RowKernel:
    """Which row kernel: S_t = S_{t-1} (diag(a_t) + p_t b_t^T) + v_t k_t^T with o_t = S_t q_t, or S_{t-1} q_t.

    gate: the axis of a. erase: none; "parallel" to k: p = a k, b = -beta k, v written as beta v; "general": any p, b.
    normalizer: one more row of the state, written with v = 1. stabilizer: a and v scaled by mLSTM's running maximum.
    """

    gate: Literal["none", "constant", "scalar", "key", "value"] = "none"
    erase: Literal["none", "parallel", "general"] = "none"
    read: Literal["after", "before"] = "after"
    normalizer: bool = False
    stabilizer: bool = False

    def __post_init__(self) -> None:
        if self.gate == "value" and (self.erase != "none" or self.normalizer):
            raise ValueError('kernel: gate "value" decays rows, it goes with erase "none" and no normalizer')
        if self.stabilizer and (self.gate, self.erase, self.read) != ("scalar", "none", "after"):
            raise ValueError('kernel: a stabilizer needs gate "scalar", erase "none" and read "after"')


class Arguments:
    """Checks the tensors of one call against each other. Sizes are known by name: the first tensor that has an axis
    of that name sets it, and every later one must agree. Each refusal is a ValueError that names the argument.

    Checks of values (slots, lengths, gates) wait for the device, so on CUDA they are made only when `check` asks.
    """

    def __init__(self, first: Tensor, check: bool | None, **sizes: int) -> None:
        if first.dtype not in INPUT_DTYPES:
            raise ValueError(f"the inputs must be float32, float16, bfloat16 or float64, not {first.dtype}")
        self.dtype, self.device, self.sizes = first.dtype, first.device, sizes
        self.gate_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.check = first.device.type == "cpu" if check is None else check

    def input(self, name: str, tensor: Tensor, axes: str) -> None:
        """A tensor in the dtype of the inputs; `axes` are the names of its sizes, or numbers, with spaces between."""
        self._layout(name, tensor, axes, (self.dtype,))

    def gate(self, name: str, tensor: Tensor, axes: str, *, closed: bool = False) -> None:
        """A tensor that is float32 whatever the inputs (float64 with those); `closed`: -inf is a legal value."""
        self._layout(name, tensor, axes, (self.gate_dtype,))
        if self.check and not bool((tensor < math.inf).all() if closed else tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite{' or -inf' if closed else ''}")

    def state(self, name: str, tensor: Tensor, axes: str) -> None:
        """A tensor with a leading slot axis that the op updates in place; each slot's own row is contiguous."""
        wide = self.dtype == torch.float64
        self._layout(name, tensor, axes, STATE_DTYPES[2:] if wide else STATE_DTYPES[:2])
        if tensor.shape[0] and not tensor[0].is_contiguous():
            raise ValueError(f"{name}: the row of a slot must be contiguous, its strides are {tensor.stride()}")

    def index(self, name: str, tensor: Tensor, axes: str) -> None:
        """A tensor of int32."""
        self._layout(name, tensor, axes, (torch.int32,))

    def packing(self, slots: Tensor, cu_seqlens: Tensor) -> None:
        """The sequences of the call; sizes N and P must be known by now."""
        self.index("slots", slots, "S")
        self.index("cu_seqlens", cu_seqlens, str(slots.shape[0] + 1))
        if not self.check:
            return
        ends, used = cu_seqlens.tolist(), [slot for slot in slots.tolist() if slot != -1]
        if ends[0] != 0 or ends[-1] != self.sizes["N"] or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cu_seqlens must rise from 0 to the {self.sizes['N']} tokens")
        if any(not 0 <= slot < self.sizes["P"] for slot in used):
            raise ValueError(f"slots must be -1 or below the {self.sizes['P']} slots of the state")
        if len(set(used)) != len(used):
            raise ValueError("slots names a slot twice")

    def _layout(self, name: str, tensor: Tensor, axes: str, dtypes: Sequence[torch.dtype]) -> None:
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {self.device}")
        names, shape, sizes = axes.split(), tensor.shape, dict(self.sizes)
        fits = len(names) == len(shape) and all(
            size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
            for axis, size in zip(names, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(f"{axis}={self.sizes[axis]}" if axis in self.sizes else axis for axis in names)
            raise ValueError(f"{name} must have shape [{wanted}], not {list(shape)}")
        self.sizes = sizes
        if shape and shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last axis must be contiguous, its stride is {tensor.stride(-1)}")


def demand(argument: str, value: object, needed: bool) -> None:
    """Refuses an optional argument that is missing, or that is given and would not be used."""
    if needed and value is None:
        raise ValueError(f"{argument} is needed")
    if not needed and value is not None:
        raise ValueError(f"{argument} is not used by this kernel: leave it out")


def find_backend(backend: Backend, family: str, inputs: Iterable[Tensor | None]) -> Any | None:
    """The module `unspool_kernels.<backend>.<family>` that will run the call, or None for the reference.

    "auto" takes triton for CUDA tensors and native for those on the CPU, and the reference for what these cannot do:
    float64 and gradients. It also takes the reference, and says so once, when the other one is missing.
    Raises BackendMissing, or ValueError for float64 or gradients, when a backend was asked for by its name.
    """
    if backend == "reference":
        return None
    tensors = [tensor for tensor in inputs if tensor is not None]
    unable = _needs_reference(tensors)
    chosen = backend if backend != "auto" else ("triton" if tensors[0].is_cuda else "native")
    if chosen not in ("native", "triton"):
        raise ValueError(f"backend must be auto, reference, native or triton, not {backend!r}")
    if unable:
        if backend == "auto":
            return None
        raise ValueError(f"backend {chosen} has no {unable}: use the reference")
    reason = why_missing(chosen, family)
    if reason is None:
        return import_module(f"unspool_kernels.{chosen}.{family}")
    if backend != "auto":
        raise BackendMissing(reason)
    _say_once(reason)
    return None


@cache
def why_missing(backend: str, family: str) -> str | None:
    """Why a backend cannot run a family of ops here, with the remedy; None when it can."""
    if find_spec(f"unspool_kernels.{backend}.{family}") is None:
        return f"backend {backend} has no kernels for {family}"
    if backend == "triton":
        return triton.missing()
    try:
        library()
    except NativeUnavailable as error:
        return str(error)
    return None


def _needs_reference(tensors: Sequence[Tensor]) -> str | None:
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "float64"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients"
    return None


@cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("%s; the slow reference kernels run instead", reason)


Result = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""What a reference function returns: its outputs, and its state tensors after the call (the given ones are kept)."""


def run_reference(form: Callable[..., Result], states: dict[str, Tensor], slots: Tensor, **arguments: Any) -> Any:
    """Calls a reference function on the rows that `slots` names and writes its new rows in place.

    Gradients flow through the outputs but not from call to call: the stored rows are detached.
    """
    used = slots[slots >= 0].long()
    local = torch.where(slots >= 0, (slots >= 0).cumsum(0) - 1, -1).int()
    outputs, ends = form(**{name: state[used] for name, state in states.items()}, slots=local, **arguments)
    for state, end in zip(states.values(), ends, strict=True):
        state.index_copy_(0, used, end.detach().to(state.dtype))
    return outputs[0] if len(outputs) == 1 else outputs
