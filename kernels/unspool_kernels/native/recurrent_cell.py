"""Recurrent cells on CPUs: one fused loop over the tokens; many of them read a packed copy of the recurrent matrix."""

from typing import Literal

import torch
from torch import Tensor

from unspool_kernels.native.library import Arguments, address, call, num_threads
from unspool_kernels.native.operands import (
    SequencesArgument,
    integers,
    layout,
    operand,
    optional,
    pointers,
    sequences,
)

_CELLS = ("elman", "lstm", "gru", "slstm")


class _RecurrentCell(Arguments):
    function = "recurrent_cell"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("x weight bias state h scratch packed"),
        *integers("heads channels cell state_stride state_format scratch_floats packed_floats"),
    ]


class _Workspace(_RecurrentCell):
    function = "recurrent_cell_workspace"


def recurrent_cell(
    x: Tensor,
    weight: Tensor,
    *,
    cell: Literal["elman", "lstm", "gru", "slstm"],
    bias: Tensor | None = None,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """As `ops.recurrent_cell`. A float16 sLSTM state scales c and n by the maximum as float16 has it."""
    tokens, heads, _, channels = x.shape
    inputs = {"x": operand(x), "weight": operand(weight), "bias": optional(bias)}
    h = torch.empty(tokens, heads, channels)
    fields = {
        "sequences": sequences(slots, cu_seqlens),
        **{name: address(tensor) for name, tensor in inputs.items()},
        **{"state": address(state), "h": address(h)},
        **{"heads": heads, "channels": channels, "cell": _CELLS.index(cell)},
        **layout(state),
    }
    size, threads = _Workspace(**fields), num_threads()
    call(size, threads)
    scratch, packed = torch.empty(size.scratch_floats), torch.empty(size.packed_floats)
    call(_RecurrentCell(**fields, scratch=address(scratch), packed=address(packed)), threads)
    return h.to(x.dtype)
