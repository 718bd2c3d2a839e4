"""Launches of the row kernel: token by token, or in chunks where the descriptor allows and sequences are long."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unspool_kernels.contract import RowKernel
from unspool_kernels.tiles import GpuLimits, Tile
from unspool_kernels.triton.device.row_chunk import row_chunk_outputs, row_chunk_states
from unspool_kernels.triton.device.row_delta import row_delta_states
from unspool_kernels.triton.device.row_recurrent import keep_last_max, row_recurrent
from unspool_kernels.triton.launch import Argument, Launch, bind, dot_precision, run_all, search_steps, strided
from unspool_kernels.triton.tiles import DELTA_BLOCK, LONG, RowSizes, chunk_tile, delta_tile, limits_of, recurrent_tile

PAIRS = 128
"""Running maxima that one program of `keep_last_max` keeps."""
AXES = {
    "q": ("token", "head", "group"),
    "k": ("token", "head"),
    "v": ("token", "head"),
    "log_decay": ("token", "head"),
    "erase_read": ("token", "head"),
    "erase_write": ("token", "head"),
    "beta": ("token",),
    "bonus": ("head",),
    "log_input": ("token",),
    "state": ("slot",),
    "max_state": ("slot",),
}
"""The strides that kernels are told, by tensor; the axes after them are contiguous."""

Tensors = Mapping[str, Tensor | None]


def row_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: RowKernel,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    **options: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `ops.row_state`; `options` are its other tensors. A chunk allocates the states inside it, a step nothing."""
    o = q.new_empty(*q.shape[:3], state.shape[2])
    m = torch.empty(k.shape[:2], dtype=torch.float32, device=q.device) if kernel.stabilizer else None
    tensors = {"q": q, "k": k, "v": v, "state": state, "slots": slots, "cu_seqlens": cu_seqlens, **options}
    run_all(plan_row_state(kernel, tensors, o, m, limits_of(o)))
    return o if m is None else (o, m)


def plan_row_state(kernel: RowKernel, tensors: Tensors, o: Tensor, m: Tensor | None, limits: GpuLimits) -> list[Launch]:
    """The launches of one call, from shapes and strides alone: the tensors may be on the meta device."""
    call = _describe(kernel, tensors, o, m, limits)
    launches = _plan_chunks(call) if _in_chunks(call) else [_plan_recurrent(call)]
    if m is not None:
        programs = -(-call.sizes.S * call.sizes.H // PAIRS)
        launches.append(bind(keep_last_max, {**call.pool, "BLOCK": PAIRS}, programs=programs))
    return launches


@dataclass(frozen=True)
class Call:
    """One call: the GPU it is planned for, and every argument that the row kernels name but for tiles and scratch."""

    kernel: RowKernel
    o: Tensor
    sizes: RowSizes
    limits: GpuLimits
    pool: dict[str, Argument]

    def launch(self, kernel: Any, tile: Tile, copies: int, extra: Mapping[str, Argument]) -> Launch:
        """With a program for each block of the state's rows, `copies` times over."""
        options = {**extra, "BK": tile["key_block"], "BR": tile["value_block"]}
        programs = copies * -(-self.sizes.R // tile["value_block"])
        return bind(kernel, {**self.pool, **options}, programs=programs, warps=tile["warps"])

    def scratch(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.o.device)


def _describe(kernel: RowKernel, tensors: Tensors, o: Tensor, m: Tensor | None, limits: GpuLimits) -> Call:
    tokens, heads, groups, rows = o.shape
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    keys, values = given["k"].shape[2], given["v"].shape[2]
    sizes = RowSizes(S=given["slots"].shape[0], H=heads, K=keys, R=rows, element_bytes=o.element_size())
    log_decay = given.get("log_decay")
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(tokens, heads)
    pool: dict[str, Argument] = {"slots": given["slots"], "cu_seqlens": given["cu_seqlens"], "o": o, "m": m}
    pool |= {"S": sizes.S, "H": heads, "G": groups, "R": rows, "K": keys, "V": values}
    for name, axes in AXES.items():
        pool |= strided(name, log_decay if name == "log_decay" else tensors.get(name), *axes)
    pool |= {"GATE": kernel.gate, "ERASE": kernel.erase, "READ": kernel.read, "STABILIZER": kernel.stabilizer}
    return Call(kernel, o, sizes, limits, pool)


def _in_chunks(call: Call) -> bool:
    """Chunks need gates of one number per head, a read of the written state, and sequences worth it."""
    kernel, sizes = call.kernel, call.sizes
    allowed = kernel.gate in ("none", "constant", "scalar") and kernel.erase != "general" and kernel.read == "after"
    long = call.o.shape[0] >= LONG * sizes.S
    return allowed and long and (kernel.erase == "none" or delta_tile(sizes, call.limits) is not None)


def _plan_recurrent(call: Call) -> Launch:
    return call.launch(row_recurrent, recurrent_tile(call.sizes, call.limits), call.sizes.S * call.sizes.H, {})


def _plan_chunks(call: Call) -> list[Launch]:
    """The states before every chunk, then all outputs. Short and empty sequences have a chunk, too."""
    sizes, (tokens, heads, groups, rows) = call.sizes, call.o.shape
    tile = chunk_tile(sizes, call.limits)
    blocks = tokens // tile["chunk"] + sizes.S
    extra: dict[str, Argument] = {
        "starts": call.scratch(blocks, heads, rows, sizes.K),
        "start_maxima": call.scratch(blocks, heads) if call.kernel.stabilizer else None,
        "C": tile["chunk"],
        "PRECISION": dot_precision(call.o.dtype),
        "steps": search_steps(sizes.S),
    }
    outputs = blocks * heads * groups
    if call.kernel.erase == "none":
        copies = sizes.S * heads * -(-sizes.K // tile["key_block"])
        states = call.launch(row_chunk_states, tile, copies, extra)
        return [states, call.launch(row_chunk_outputs, tile, outputs, extra)]
    delta = delta_tile(sizes, call.limits)
    assert delta is not None
    corrections = call.scratch(tokens, heads, rows)
    erased = {**extra, "corrections": corrections, "B": DELTA_BLOCK}
    states = call.launch(row_delta_states, delta, sizes.S * heads, erased)
    written = {**strided("v", corrections, "token", "head"), "V": rows}
    return [states, call.launch(row_chunk_outputs, tile, outputs, {**extra, **written})]
