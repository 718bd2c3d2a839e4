"""What the wrappers of the kernel families share: tensors as the library takes them, and the packed sequences."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from unspool_kernels.native.library import address

_STATE_FORMATS = {torch.float32: 0, torch.float16: 2}


class SequencesArgument(ctypes.Structure):
    """`Sequences` of family_arguments.h."""

    _fields_ = [("slots", ctypes.c_void_p), ("starts", ctypes.c_void_p), ("count", ctypes.c_int64)]


def sequences(slots: Tensor, cu_seqlens: Tensor) -> SequencesArgument:
    """The caller keeps both tensors alive during the call."""
    return SequencesArgument(address(slots), address(cu_seqlens), slots.shape[0])


def pointers(names: str) -> list[tuple[str, Any]]:
    """Fields of a structure that are memory."""
    return [(name, ctypes.c_void_p) for name in names.split()]


def integers(names: str) -> list[tuple[str, Any]]:
    """Fields of a structure that are 64-bit integers."""
    return [(name, ctypes.c_int64) for name in names.split()]


def operand(tensor: Tensor) -> Tensor:
    """The tensor in float32 with no gaps: itself if it is so already."""
    return tensor.float().contiguous()


def optional(tensor: Tensor | None) -> Tensor | None:
    """`operand` of what may be absent."""
    return None if tensor is None else operand(tensor)


def layout(state: Tensor) -> dict[str, int]:
    """The fields that tell how the rows of a state's slots lie and what they hold."""
    return {"state_stride": state.stride(0), "state_format": _STATE_FORMATS[state.dtype]}
