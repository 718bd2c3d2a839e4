"""First-order scans on CPUs: a block of channels stays in L1 while the tokens of a sequence pass by."""

import math

import torch
from torch import Tensor

from unspool_kernels.native.library import Arguments, address, call
from unspool_kernels.native.operands import (
    SequencesArgument,
    integers,
    layout,
    operand,
    optional,
    pointers,
    sequences,
)


class _DiagonalScan(Arguments):
    function = "diagonal_scan"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("x decay read state y"),
        *integers("channels features complex decay_stride read_token read_channel state_stride state_format"),
    ]


class _ExponentialScan(Arguments):
    function = "exponential_scan"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("k v decay bonus state y"),
        *integers("channels state_stride state_format"),
    ]


def diagonal_scan(
    x: Tensor, decay: Tensor, *, read: Tensor | None = None, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """As `ops.diagonal_scan`."""
    channels, features = x.shape[1], math.prod(x.shape[2:])
    inputs, decays, reads = operand(x), operand(decay), optional(read)
    per_token = reads is not None and reads.dim() == x.dim()
    y = torch.empty(x.shape if read is None else x.shape[:2])
    call(
        _DiagonalScan(
            sequences=sequences(slots, cu_seqlens),
            x=address(inputs),
            decay=address(decays),
            read=address(reads),
            state=address(state),
            y=address(y),
            channels=channels,
            features=features,
            complex=state.dim() == 4,
            decay_stride=channels * features if decay.dim() == x.dim() else 0,
            read_token=features if per_token else 0,
            read_channel=0 if per_token else features,
            **layout(state),
        )
    )
    return y.to(x.dtype)


def exponential_scan(
    k: Tensor, v: Tensor, *, decay: Tensor, bonus: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """As `ops.exponential_scan`. A float16 state scales its sums by the maximum as float16 has it."""
    keys, values, decays, bonuses = map(operand, (k, v, decay, bonus))
    y = torch.empty(k.shape)
    call(
        _ExponentialScan(
            sequences=sequences(slots, cu_seqlens),
            k=address(keys),
            v=address(values),
            decay=address(decays),
            bonus=address(bonuses),
            state=address(state),
            y=address(y),
            channels=k.shape[1],
            **layout(state),
        )
    )
    return y.to(k.dtype)
