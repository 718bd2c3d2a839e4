"""Exact softmax attention over the near set: the first M tokens (sinks) and the last W (a ring), in one buffer of rows.

Row of position p: p while p < M, else M + (p - M) mod W (the sinks of arXiv 2309.17453). Rows fill in order, so the
valid ones are a prefix. Keys are rotated before they come here. Besides its output the attention returns its
log-sum-exp, so that it merges exactly with any other shard of the same softmax.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_BLOCK = 128


class NearOutput(NamedTuple):
    """values [B, T, H, G, D] in float32 or wider, and their softmax's log_mass and row_max [B, T, H, G]."""

    values: Tensor
    log_mass: Tensor
    row_max: Tensor


class History(NamedTuple):
    """The near set before a chunk: ring rows in order of position [B, H, W, D] and sink rows [B, H, M, D]."""

    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor


def row_of(position: Tensor, window: int, sinks: int) -> Tensor:
    """The buffer row that holds a position, while it is near."""
    return torch.where(position < sinks, position, sinks + (position - sinks) % window)


def read_history(keys: Tensor, values: Tensor, start: Tensor, window: int, sinks: int) -> History:
    """Copies the near set out of buffers [B, H, M + W, D] whose next token has position start [B].

    Ring rows come in order of position start - W .. start - 1; rows of positions below M hold junk to be masked.
    """
    batch, heads, _, channels = keys.shape
    order = torch.arange(window, device=keys.device) + start[:, None]
    rows = (sinks + (order - sinks) % window)[:, None, :, None].expand(batch, heads, window, channels)
    return History(keys.gather(2, rows), values.gather(2, rows), keys[:, :, :sinks], values[:, :, :sinks])


def empty_history(keys: Tensor, window: int, sinks: int) -> History:
    """The near set before the first of the tokens [B, T, H, D], with no more ring rows than these can use."""
    batch, tokens, heads, channels = keys.shape
    ring = keys.new_zeros(batch, heads, min(window, tokens), channels)
    sink = keys.new_zeros(batch, heads, sinks, channels)
    return History(ring, ring, sink, sink)


def with_new_sinks(history: History, keys: Tensor, values: Tensor, start: Tensor, length: Tensor) -> History:
    """Adds those of a chunk's tokens [B, T, H, D] that are sinks, out of place (so gradients flow)."""
    sinks, tokens = history.sink_keys.shape[2], keys.shape[1]
    offset = torch.arange(sinks, device=keys.device) - start[:, None]  # where in the chunk sink s stands
    here = ((offset >= 0) & (offset < length[:, None]))[:, None, :, None]
    index = offset.clamp(0, tokens - 1)[:, :, None, None].expand(-1, -1, *keys.shape[2:])
    return history._replace(
        sink_keys=torch.where(here, keys.gather(1, index).transpose(1, 2), history.sink_keys),
        sink_values=torch.where(here, values.gather(1, index).transpose(1, 2), history.sink_values),
    )


def step(q: Tensor, sink_q: Tensor, keys: Tensor, values: Tensor, position: Tensor, sinks: int) -> NearOutput:
    """One token per sequence, already written: q and sink_q [B, H, G, D], keys and values [B, H, M + W, D],
    position [B] of that token. sink_q is the query as the sinks see it. The result has T = 1."""
    scale = q.shape[-1] ** -0.5
    scores = torch.cat(
        [sink_q @ keys[:, :, :sinks].transpose(-1, -2), q @ keys[:, :, sinks:].transpose(-1, -2)], dim=-1
    )
    valid = torch.arange(keys.shape[2], device=keys.device) <= position[:, None]
    scores = _at_least_float32(scores * scale).masked_fill(~valid[:, None, None], -torch.inf)
    row_max = scores.amax(-1)
    weights = scores.softmax(-1)
    # From the largest weight, in float64: see `linear` for why a batch must not change the order of any sum or the
    # path of any function; softmax works row by row, and so does what follows.
    log_mass = row_max - weights.amax(-1).double().log().to(row_max.dtype)
    output = (weights.to(values.dtype) @ values).to(row_max.dtype)
    return NearOutput(output[:, None], log_mass[:, None], row_max[:, None])


def chunk(q: Tensor, sink_q: Tensor, keys: Tensor, values: Tensor, history: History, start: Tensor) -> NearOutput:
    """T tokens per sequence from position start [B]: q and sink_q [B, T, H, G, D], keys and values [B, T, H, D].

    `history` must already hold the chunk's own sinks (`with_new_sinks`). Equals T steps.
    """
    window, length = history.keys.shape[2], q.shape[1]
    block = min(MAX_BLOCK, max(window, 16), length)
    blocks = -(-length // block)
    band_keys = _bands(history.keys, keys, window, block, blocks)  # [B, H, N, block + W, D]
    band_values = _bands(history.values, values, window, block, blocks)
    scale = q.shape[-1] ** -0.5
    scores = _in_blocks(q, block, blocks) @ band_keys[:, :, :, None].transpose(-1, -2)  # [B, H, N, G, block, block + W]
    sink_scores = _in_blocks(sink_q, block, blocks) @ history.sink_keys[:, :, None, None].transpose(-1, -2)
    sink_count = sink_scores.shape[-1]
    scores = _at_least_float32(torch.cat([sink_scores, scores], dim=-1) * scale)
    scores = scores.masked_fill(~_visible(start, window, sink_count, block, blocks), -torch.inf)
    row_max = scores.amax(-1)
    shift = row_max.detach()  # outputs do not depend on it
    weights = (scores - shift[..., None]).exp()
    mass = weights.sum(-1)
    used = weights.to(values.dtype)
    output = used[..., :sink_count] @ history.sink_values[:, :, None, None] + (
        used[..., sink_count:] @ band_values[:, :, :, None]
    )
    output = output.to(mass.dtype) / mass[..., None]
    return NearOutput(
        _from_blocks(output, length), _from_blocks(shift + mass.log(), length), _from_blocks(row_max, length)
    )


def write(
    rows_keys: Tensor, rows_values: Tensor, keys: Tensor, values: Tensor, start: Tensor, length: Tensor, sinks: int
) -> None:
    """Writes a chunk's tokens [B, T, H, D] into the buffers [B, H, M + W, D] in place; only the first `length` [B]
    tokens of a sequence count, and of those the sinks and the last W."""
    window = rows_keys.shape[2] - sinks
    offset = torch.arange(keys.shape[1], device=keys.device)
    position = start[:, None] + offset
    last = (start + length)[:, None]
    stays = (offset < length[:, None]) & ((position < sinks) | (position >= last - window))
    sequence, token = stays.nonzero(as_tuple=True)
    row = row_of(position[sequence, token], window, sinks)
    rows_keys[sequence, :, row] = keys[sequence, token].to(rows_keys.dtype)
    rows_values[sequence, :, row] = values[sequence, token].to(rows_values.dtype)


def _bands(past: Tensor, chunk_rows: Tensor, window: int, block: int, blocks: int) -> Tensor:
    rows = torch.cat([past, chunk_rows.transpose(1, 2)], dim=2)
    rows = F.pad(rows, (0, 0, 0, window + block * blocks - rows.shape[2]))
    return rows.unfold(2, window + block, block).transpose(-1, -2)


def _in_blocks(q: Tensor, block: int, blocks: int) -> Tensor:
    padded = F.pad(q, (0, 0, 0, 0, 0, 0, 0, block * blocks - q.shape[1]))
    blocked = padded.reshape(q.shape[0], blocks, block, *q.shape[2:])
    return blocked.permute(0, 3, 1, 4, 2, 5)  # [B, H, N, G, block, D]


def _from_blocks(blocked: Tensor, length: int) -> Tensor:
    heads_last = blocked.transpose(1, 2).movedim(4, 2)  # [B, N, block, H, G, ...]
    return heads_last.flatten(1, 2)[:, :length]


def _visible(start: Tensor, window: int, sinks: int, block: int, blocks: int) -> Tensor:
    """[B, 1, N, 1, block, M + block + W]: which sinks and which rows of its band each query may see."""
    device = start.device
    query = torch.arange(block, device=device)[:, None]
    row = torch.arange(block + window, device=device)
    first = start[:, None] + block * torch.arange(blocks, device=device)  # position of each block's first query
    in_band = (row > query) & (row <= query + window)  # [block, block + W]
    is_ring = first[..., None] + row - window >= sinks  # [B, N, block + W]
    sink_seen = torch.arange(sinks, device=device) <= (first[..., None] + query[:, 0])[..., None]  # [B, N, block, M]
    visible = torch.cat([sink_seen, in_band & is_ring[:, :, None]], dim=-1)
    # Padding queries of the last block may see nothing: let them see one row, their output is cut off.
    visible[..., 0] |= ~visible.any(-1)
    return visible[:, None, :, None]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
