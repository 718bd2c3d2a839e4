"""Softmax with a fixed query as a recurrence, on CPUs."""

import torch
from torch import Tensor

from unspool_kernels.native.library import Arguments, address, call
from unspool_kernels.native.operands import SequencesArgument, integers, layout, operand, pointers, sequences


class _SoftmaxScan(Arguments):
    function = "softmax_scan"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("scores v state o log_mass"),
        *integers("heads values state_stride state_format"),
    ]


def softmax_scan(
    scores: Tensor, v: Tensor, *, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """As `ops.softmax_scan`. A float16 state scales its sums by the maximum as float16 has it."""
    weights, values = operand(scores), operand(v)
    o, log_mass = torch.empty(v.shape), torch.empty(scores.shape)
    call(
        _SoftmaxScan(
            sequences=sequences(slots, cu_seqlens),
            scores=address(weights),
            v=address(values),
            state=address(state),
            o=address(o),
            log_mass=address(log_mass),
            heads=v.shape[1],
            values=v.shape[2],
            **layout(state),
        )
    )
    return o.to(v.dtype), log_mass
