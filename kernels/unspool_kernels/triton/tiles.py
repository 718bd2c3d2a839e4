"""How much of a problem one program takes, by kernel: problems for the solver of `unspool_kernels.tiles`, and the
sizes of kernels too simple to need one. No measurement, no autotuning.

The solver counts the tiles that a kernel holds; what a kernel needs beside them is here as a budget of registers,
chosen so that none spills on sm_80 or sm_90, which `ahead_of_time` checks.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool_kernels.tiles import (
    SM_80,
    GpuChunkKernel,
    GpuLimits,
    GpuRingAttention,
    GpuRowKernel,
    Tile,
    TileProblem,
    enumerate_tiles,
    propose,
)
from unspool_kernels.tiles.gpu import DOT_SIDE, WARP, padded

LONG = 16
"""Tokens per sequence, on average, from which chunks are chosen. The lengths themselves stay on the device."""
RECURRENT_REGISTERS = 159
CHUNK_REGISTERS = {4: 127, 2: 143}
DELTA_REGISTERS = {4: 95, 2: 159}
"""By bytes of an input: float32 is multiplied in three parts, which are held as well."""
RING_REGISTERS = {128: 143, 256: 175}
"""By the widest head; wider ones take what the GPU has, and may spill."""
CHUNK_KEYS = {4: 32, 2: 64}
"""The widest block of keys in chunks, by bytes of an input."""
DELTA_BLOCK = 16
SOFTMAX_CHUNK = 32
RING_STEP_PRODUCTS = 32
"""Products of a query's and a key's channels in each thread of a step of ring attention."""
RING_QUERY_ELEMENTS = {4: 2048, 2: 4096}
"""Channels of the queries that a chunk of ring attention takes at once, by bytes of an input."""
RING_ROWS_WRITTEN = 32
SCAN_CHANNELS = 128
SCAN_ELEMENTS = 512
CONV_TOKENS = 16
CONV_CHANNELS = 128
RING_CHANNELS = 1024
NORM_ELEMENTS = 1024
ELEMENTS_PER_WARP = 512
REMEMBERED_PROBLEMS = 4096


class RowSizes(NamedTuple):
    """S sequences, H heads, K key features, R rows of the state; bytes of an input's element."""

    S: int
    H: int
    K: int
    R: int
    element_bytes: int


def limits_of(tensor: Tensor) -> GpuLimits:
    """Of the GPU that holds the tensor; an A100's where kernels are interpreted."""
    return _limits_of_gpu(tensor.device) if tensor.is_cuda else SM_80


@lru_cache
def _limits_of_gpu(device: torch.device) -> GpuLimits:
    found: Any = torch.cuda.get_device_properties(device)  # torch's stub leaves the last of these out
    return GpuLimits(multiprocessors=found.multi_processor_count, shared_bytes=found.shared_memory_per_block_optin)


def recurrent_tile(sizes: RowSizes, limits: GpuLimits) -> Tile:
    """key_block, which covers K, value_block and warps of `row_recurrent`. Keys too wide for the budget take what the
    GPU has, and may spill; raises ValueError for keys too wide for that."""
    for registers in (RECURRENT_REGISTERS, limits.registers_per_thread):
        tile = propose(_row_problem(sizes, replace(limits, registers_per_thread=registers)))
        if tile["key_block"] >= sizes.K:
            return tile
    widest = tile["key_block"]
    raise ValueError(f"k: the triton backend holds {widest} key features, not {sizes.K}: use backend='reference'")


def chunk_tile(sizes: RowSizes, limits: GpuLimits) -> Tile:
    """chunk, key_block, value_block and warps of the two passes over chunks.

    Its stages are left alone: with loads in flight some versions of ptxas spill a few bytes."""
    problem = GpuChunkKernel(
        sequences=max(1, sizes.S),
        heads=sizes.H,
        key_features=min(sizes.K, CHUNK_KEYS[sizes.element_bytes]),
        value_channels=sizes.R,
        element_bytes=sizes.element_bytes,
        limits=replace(limits, registers_per_thread=CHUNK_REGISTERS[sizes.element_bytes]),
    )
    return propose(problem)


def delta_tile(sizes: RowSizes, limits: GpuLimits) -> Tile | None:
    """key_block, which covers K, value_block and warps of `row_delta_states`; None for keys too wide."""
    budget = replace(limits, registers_per_thread=DELTA_REGISTERS[sizes.element_bytes])
    problem = _row_problem(sizes._replace(R=max(DOT_SIDE, sizes.R)), budget)
    tile = _first(problem, _multiplies)
    return None if tile["key_block"] < sizes.K else tile


@lru_cache(REMEMBERED_PROBLEMS)
def ring_step_tile(queries: int, head_dim: int, rows: int, limits: GpuLimits) -> Tile | None:
    """ring_block and warps of `ring_attention_step`, which forms every query's products with a block at once; None
    where these are too many, or where the queries fill a matrix product on their own."""
    if queries >= DOT_SIDE:
        return None
    problem = GpuRingAttention(queries=queries, head_dim=head_dim, ring_rows=rows, limits=limits)
    per_thread = queries * padded(head_dim) / WARP
    tiles = enumerate_tiles(problem)
    return next((t for t in tiles if per_thread * t["ring_block"] <= RING_STEP_PRODUCTS * t["warps"]), None)


def ring_chunk_tile(queries: int, head_dim: int, rows: int, limits: GpuLimits) -> Tile:
    """ring_block and warps of `ring_attention_chunk` for so many queries of a head, of several tokens."""
    fitting = (registers for width, registers in RING_REGISTERS.items() if head_dim <= width)
    budget = replace(limits, registers_per_thread=next(fitting, limits.registers_per_thread))
    return propose(GpuRingAttention(queries=queries, head_dim=head_dim, ring_rows=rows, limits=budget))


def ring_queries(head_dim: int, element_bytes: int) -> int:
    """Queries of a head that `ring_attention_chunk` takes at once."""
    return max(DOT_SIDE, min(64, RING_QUERY_ELEMENTS[element_bytes] // padded(head_dim)))


def _row_problem(sizes: RowSizes, limits: GpuLimits) -> GpuRowKernel:
    return GpuRowKernel(
        slots=max(1, sizes.S), heads=sizes.H, key_features=sizes.K, value_channels=sizes.R, limits=limits
    )


def _multiplies(tile: Tile) -> bool:
    return tile["value_block"] >= DOT_SIDE


@lru_cache(REMEMBERED_PROBLEMS)
def _first(problem: TileProblem, allowed: Callable[[Tile], bool]) -> Tile:
    return next(tile for tile in enumerate_tiles(problem) if allowed(tile))


def warps_for(elements: int) -> int:
    """Warps that hold so many elements, 16 to a thread."""
    return min(8, max(1, elements // ELEMENTS_PER_WARP))


def scan_channels(features: int) -> int:
    """Channels of a diagonal scan with so many features each."""
    return max(1, SCAN_ELEMENTS // padded(features, 1))


def norm_row_block(width: int) -> int:
    """Rows of so many channels."""
    return max(1, NORM_ELEMENTS // width)
