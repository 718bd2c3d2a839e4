"""The causal depthwise convolution and the token shift, on CPUs."""

from typing import Literal

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


class _ShortConv(Arguments):
    function = "short_conv"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("x taps bias state cursor y"),
        *integers("channels depth silu state_stride cursor_stride state_format"),
    ]


class _TokenShift(Arguments):
    function = "token_shift"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("x state y"),
        *integers("channels state_stride state_format"),
    ]


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
    *,
    state: Tensor,
    cursor: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """As `ops.short_conv`."""
    inputs, taps, biases = operand(x), operand(weight.T), optional(bias)
    y = torch.empty(x.shape)
    call(
        _ShortConv(
            sequences=sequences(slots, cu_seqlens),
            x=address(inputs),
            taps=address(taps),
            bias=address(biases),
            state=address(state),
            cursor=address(cursor),
            y=address(y),
            channels=x.shape[1],
            depth=state.shape[1],
            silu=activation == "silu",
            cursor_stride=cursor.stride(0),
            **layout(state),
        )
    )
    return y.to(x.dtype)


def token_shift(x: Tensor, *, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    """As `ops.token_shift`."""
    inputs, y = operand(x), torch.empty(x.shape)
    call(
        _TokenShift(
            sequences=sequences(slots, cu_seqlens),
            x=address(inputs),
            state=address(state),
            y=address(y),
            channels=x.shape[1],
            **layout(state),
        )
    )
    return y.to(x.dtype)
