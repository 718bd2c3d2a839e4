"""Launches of the first-order scans, token by token whatever the length: nothing in them is a matrix product."""

import torch
from torch import Tensor

from unspool_kernels.tiles.gpu import padded
from unspool_kernels.triton.device.diagonal_scan import (
    complex_scan_recurrent,
    diagonal_scan_recurrent,
    exponential_scan_recurrent,
)
from unspool_kernels.triton.launch import Argument, Launch, bind, run_all, strided
from unspool_kernels.triton.tiles import SCAN_CHANNELS, scan_channels


def diagonal_scan(
    x: Tensor, decay: Tensor, *, read: Tensor | None = None, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """As `ops.diagonal_scan`."""
    h = torch.empty(x.shape if read is None else x.shape[:2], dtype=x.dtype, device=x.device)
    tensors = {"x": x, "decay": decay, "state": state, "slots": slots, "cu_seqlens": cu_seqlens, "h": h}
    run_all(plan_diagonal_scan(tensors, read))
    return h


def plan_diagonal_scan(tensors: dict[str, Tensor], read: Tensor | None) -> list[Launch]:
    """The launches of one call, from shapes and strides alone: the tensors may be on the meta device."""
    x, sequences = tensors["x"], tensors["slots"].shape[0]
    channels, features = x.shape[1:3]
    weights = None if read is None else read.expand(x.shape)
    block = scan_channels(features)
    pool: dict[str, Argument] = {
        **tensors,
        **strided("x", x, "token", "channel", "feature"),
        **strided("decay", tensors["decay"].expand(x.shape), "token", "channel", "feature"),
        **strided("read", weights, "token", "channel", "feature"),
        **strided("state", tensors["state"], "slot"),
        "C": channels,
        "M": features,
        "SUMMED": read is not None,
        "BC": block,
        "BM": padded(features, 1),
    }
    kernel = complex_scan_recurrent if x.dim() == 4 else diagonal_scan_recurrent
    return [bind(kernel, pool, programs=sequences * -(-channels // block))]


def exponential_scan(
    k: Tensor, v: Tensor, *, decay: Tensor, bonus: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """As `ops.exponential_scan`."""
    y = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    tensors = {"k": k, "v": v, "decay": decay, "bonus": bonus, "state": state, "slots": slots}
    run_all(plan_exponential_scan({**tensors, "cu_seqlens": cu_seqlens, "y": y}))
    return y


def plan_exponential_scan(tensors: dict[str, Tensor]) -> list[Launch]:
    """The launches of one call, from shapes and strides alone: the tensors may be on the meta device."""
    channels = tensors["k"].shape[1]
    pool: dict[str, Argument] = {
        **tensors,
        **strided("k", tensors["k"], "token"),
        **strided("v", tensors["v"], "token"),
        **strided("state", tensors["state"], "slot"),
        "C": channels,
        "BC": SCAN_CHANNELS,
    }
    programs = tensors["slots"].shape[0] * -(-channels // SCAN_CHANNELS)
    return [bind(exponential_scan_recurrent, pool, programs=programs)]
