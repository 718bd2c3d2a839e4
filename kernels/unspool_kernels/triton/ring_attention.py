"""Launches of attention over sinks and ring: token by token, or in chunks where sequences are long.

Sixteen query heads per state head, or more, fill a matrix product on their own: they always come in chunks.
"""

import torch
from torch import Tensor

from unspool_kernels.tiles import GpuLimits
from unspool_kernels.tiles.gpu import DOT_SIDE, padded
from unspool_kernels.triton.device.ring_attention import ring_attention_chunk, ring_attention_step, ring_attention_write
from unspool_kernels.triton.launch import Argument, Launch, bind, dot_precision, run_all, search_steps, strided
from unspool_kernels.triton.tiles import (
    LONG,
    RING_ROWS_WRITTEN,
    limits_of,
    ring_chunk_tile,
    ring_queries,
    ring_step_tile,
)


def ring_attention(
    q: Tensor,
    sink_q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    sinks: int,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.ring_attention`."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    row_max = torch.empty_like(log_mass)
    tensors = {"q": q, "sink_q": sink_q, "k": k, "v": v, "keys": keys, "values": values, "positions": positions}
    tensors |= {"slots": slots, "cu_seqlens": cu_seqlens, "o": o, "log_mass": log_mass, "row_max": row_max}
    run_all(plan_ring_attention(tensors, sinks, limits_of(q)))
    return o, log_mass, row_max


def plan_ring_attention(tensors: dict[str, Tensor], sinks: int, limits: GpuLimits) -> list[Launch]:
    """The launches of one call, from shapes and strides alone: the tensors may be on the meta device."""
    tokens, heads, groups, channels = tensors["q"].shape
    sequences, rows = tensors["slots"].shape[0], tensors["keys"].shape[2]
    pool: dict[str, Argument] = {**tensors, "scale": channels**-0.5, "S": sequences, "M": sinks, "W": rows - sinks}
    for name in ("q", "sink_q"):
        pool |= strided(name, tensors[name], "token", "head", "group")
    for name in ("k", "v"):
        pool |= strided(name, tensors[name], "token", "head")
    for name in ("keys", "values"):
        pool |= strided(name, tensors[name], "slot")
    group_block, width = padded(groups, 1), padded(channels)
    pool |= {"H": heads, "G": groups, "D": channels, "BG": group_block, "BD": width}
    long = tokens >= LONG * sequences
    step = ring_step_tile(group_block, channels, rows, limits)
    if not long and step is not None:
        pool |= {"BN": step["ring_block"]}
        return [bind(ring_attention_step, pool, programs=sequences * heads, warps=step["warps"])]
    queries = ring_queries(channels, tensors["q"].element_size()) if long else DOT_SIDE
    tokens_at_once = max(1, queries // group_block)
    tile = ring_chunk_tile(tokens_at_once * group_block, channels, rows, limits)
    pool |= {"steps": search_steps(sequences), "PRECISION": dot_precision(tensors["q"].dtype)}
    read = {**pool, "C": tokens_at_once, "BN": tile["ring_block"]}
    write = {**pool, "BN": RING_ROWS_WRITTEN}
    blocks, parts = tokens // tokens_at_once + sequences, -(-rows // RING_ROWS_WRITTEN)
    return [
        bind(ring_attention_chunk, read, programs=blocks * heads, warps=tile["warps"]),
        bind(ring_attention_write, write, programs=sequences * heads * parts),
    ]
