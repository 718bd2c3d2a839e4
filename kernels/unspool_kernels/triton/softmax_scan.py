"""Launches of Aaren's softmax scan: token by token, or in chunks where sequences are long."""

import torch
from torch import Tensor

from unspool_kernels.tiles.gpu import padded
from unspool_kernels.triton.device.softmax_scan import softmax_scan_chunk, softmax_scan_recurrent
from unspool_kernels.triton.launch import Argument, Launch, bind, dot_precision, run_all, strided
from unspool_kernels.triton.tiles import LONG, SOFTMAX_CHUNK, warps_for


def softmax_scan(
    scores: Tensor, v: Tensor, *, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """As `ops.softmax_scan`."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    log_mass = torch.empty(scores.shape, dtype=torch.float32, device=v.device)
    tensors = {"scores": scores, "v": v, "state": state, "slots": slots, "cu_seqlens": cu_seqlens}
    run_all(plan_softmax_scan({**tensors, "o": o, "log_mass": log_mass}))
    return o, log_mass


def plan_softmax_scan(tensors: dict[str, Tensor]) -> list[Launch]:
    """The launches of one call, from shapes and strides alone: the tensors may be on the meta device."""
    tokens, heads, channels = tensors["v"].shape
    sequences, width = tensors["slots"].shape[0], padded(channels)
    pool: dict[str, Argument] = {
        **tensors,
        **strided("scores", tensors["scores"], "token"),
        **strided("v", tensors["v"], "token", "head"),
        **strided("state", tensors["state"], "slot"),
        "H": heads,
        "V": channels,
        "BV": width,
    }
    if tokens < LONG * sequences:
        return [bind(softmax_scan_recurrent, pool, programs=sequences * heads, warps=warps_for(width))]
    chunk: dict[str, Argument] = {"C": SOFTMAX_CHUNK, "PRECISION": dot_precision(tensors["v"].dtype)}
    return [bind(softmax_scan_chunk, {**pool, **chunk}, programs=sequences * heads, warps=4)]
