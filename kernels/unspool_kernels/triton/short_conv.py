"""Launches of the short convolution and the token shift: all tokens at once, then the rings move on."""

from typing import Literal

import torch
from torch import Tensor

from unspool_kernels.tiles.gpu import padded
from unspool_kernels.triton.device.short_conv import short_conv_outputs, short_conv_write, token_shift_blocks
from unspool_kernels.triton.launch import Argument, Launch, bind, run_all, search_steps, strided
from unspool_kernels.triton.tiles import CONV_CHANNELS, CONV_TOKENS, LONG, RING_CHANNELS


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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = {"x": x, "weight": weight, "state": state, "cursor": cursor, "slots": slots, "cu_seqlens": cu_seqlens}
    run_all(plan_short_conv({**tensors, "y": y}, bias, activation))
    return y


def plan_short_conv(
    tensors: dict[str, Tensor], bias: Tensor | None, activation: Literal["none", "silu"]
) -> list[Launch]:
    """The launches of one call, from shapes and strides alone: the tensors may be on the meta device."""
    channels, taps = tensors["weight"].shape
    tokens, sequences = tensors["x"].shape[0], tensors["slots"].shape[0]
    pool: dict[str, Argument] = {
        **tensors,
        "bias": bias,
        **strided("x", tensors["x"], "token"),
        **strided("weight", tensors["weight"], "channel"),
        **strided("state", tensors["state"], "slot"),
        **strided("cursor", tensors["cursor"], "slot"),
        "N": tokens,
        "S": sequences,
        "steps": search_steps(sequences),
        "C": channels,
        "W": taps,
        "ACTIVATION": activation,
    }
    block = _tokens_at_once(tokens, sequences)
    outputs = {**pool, "BT": block, "BC": CONV_CHANNELS}
    write = {**pool, "BW": padded(taps - 1, 1), "BC": RING_CHANNELS}
    parts = -(-tokens // block) * -(-channels // CONV_CHANNELS)
    return [bind(short_conv_outputs, outputs, programs=parts), bind(short_conv_write, write, programs=sequences)]


def token_shift(x: Tensor, *, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    """As `ops.token_shift`."""
    previous = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = {"x": x, "state": state, "slots": slots, "cu_seqlens": cu_seqlens, "previous": previous}
    run_all(plan_token_shift(tensors))
    return previous


def plan_token_shift(tensors: dict[str, Tensor]) -> list[Launch]:
    """The launches of one call, from shapes and strides alone: the tensors may be on the meta device."""
    tokens, channels = tensors["x"].shape
    sequences = tensors["slots"].shape[0]
    pool: dict[str, Argument] = {
        **tensors,
        **strided("x", tensors["x"], "token"),
        **strided("state", tensors["state"], "slot"),
        "C": channels,
        "BT": _tokens_at_once(tokens, sequences),
        "BC": CONV_CHANNELS,
    }
    return [bind(token_shift_blocks, pool, programs=sequences * -(-channels // CONV_CHANNELS))]


def _tokens_at_once(tokens: int, sequences: int) -> int:
    return CONV_TOKENS if tokens >= LONG * sequences else 1
