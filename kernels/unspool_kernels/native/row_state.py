"""The row kernel on CPUs: rows of a head's state stay in L1 while the tokens of a sequence pass by."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from unspool_kernels.contract import RowKernel
from unspool_kernels.native.library import Arguments, address, call, instruction_set
from unspool_kernels.native.operands import (
    SequencesArgument,
    integers,
    layout,
    operand,
    optional,
    pointers,
    sequences,
)
from unspool_kernels.tiles import CpuLimits, CpuRowKernel, Infeasible, propose

_GATES = ("none", "constant", "scalar", "key", "value")
_ERASES = ("none", "parallel", "general")


class RowTile(NamedTuple):
    """How much one piece of work takes: value_rows rows of one head, of which row_block (1 or 4) are visited at once.

    Results do not depend on it.
    """

    row_block: int
    value_rows: int


class _RowState(Arguments):
    function = "row_state"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("q k v log_decay erase_read erase_write beta bonus log_input state max_state o m"),
        *pointers("scalars decay decayed_key bonus_weight"),
        *integers("heads queries keys values rows state_stride max_stride state_format gate erase read_before"),
        *integers("row_block value_rows"),
    ]


def row_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: RowKernel,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    log_decay: Tensor | None = None,
    erase_read: Tensor | None = None,
    erase_write: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: Tensor | None = None,
    max_state: Tensor | None = None,
    tile: RowTile | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `ops.row_state`. Raises ValueError for a tile that is not possible."""
    tokens, heads, queries, keys = q.shape
    rows, values = state.shape[2], v.shape[2]
    given = {
        **{"q": operand(q), "k": operand(k), "v": operand(v), "log_decay": optional(log_decay), "beta": optional(beta)},
        **{"erase_read": optional(erase_read), "erase_write": optional(erase_write)},
        **{"bonus": optional(bonus), "log_input": optional(log_input)},
        "o": torch.empty(tokens, heads, queries, rows),
        "m": torch.empty(tokens, heads) if kernel.stabilizer else None,
        "scalars": torch.empty(tokens, heads, 2) if kernel.gate != "none" else None,
        "decay": torch.empty_like(log_decay) if log_decay is not None and log_decay.dim() == 3 else None,
        "decayed_key": torch.empty_like(k, dtype=torch.float32) if _decays_keys(kernel) else None,
        "bonus_weight": torch.empty(tokens, heads, queries) if bonus is not None else None,
    }
    tile = tile or choose_tile(slots.shape[0], q, state, kernel)
    call(
        _RowState(
            sequences=sequences(slots, cu_seqlens),
            **{name: address(tensor) for name, tensor in given.items()},
            state=address(state),
            max_state=address(max_state),
            max_stride=0 if max_state is None else max_state.stride(0),
            **layout(state),
            **{"heads": heads, "queries": queries, "keys": keys, "values": values, "rows": rows},
            gate=_GATES.index(kernel.gate),
            erase=_ERASES.index(kernel.erase),
            read_before=kernel.read == "before",
            row_block=tile.row_block,
            value_rows=tile.value_rows,
        )
    )
    o, m = given["o"], given["m"]
    assert o is not None
    return o.to(q.dtype) if m is None else (o.to(q.dtype), m)


def choose_tile(num_sequences: int, q: Tensor, state: Tensor, kernel: RowKernel) -> RowTile:
    """What the tile solver proposes for a call on this machine; a row too long for L1 goes alone."""
    erase, machine = kernel.erase != "none", (torch.get_num_threads(), instruction_set())
    return _proposed(num_sequences, tuple(q.shape[1:]), state.shape[2], state.element_size(), erase, machine)


@functools.lru_cache(4096)
def _proposed(
    num_sequences: int, head_sizes: tuple[int, ...], rows: int, state_bytes: int, erase: bool, machine: tuple[int, str]
) -> RowTile:
    try:
        tile = propose(row_problem(num_sequences, head_sizes, rows, state_bytes, erase, machine))
    except Infeasible:
        return RowTile(1, 1)
    return RowTile(tile["row_block"], tile["value_rows"])


def row_problem(
    num_sequences: int, head_sizes: tuple[int, ...], rows: int, state_bytes: int, erase: bool, machine: tuple[int, str]
) -> CpuRowKernel:
    """The tile problem of a call: head_sizes (H, G, K) of its queries, rows R of its state, machine (threads,
    instruction set)."""
    heads, queries, keys = head_sizes
    return CpuRowKernel(
        slots=max(num_sequences, 1),
        heads=heads,
        key_features=keys,
        value_channels=rows,
        state_bytes=state_bytes,
        queries=queries,
        erase=erase,
        limits=_limits(*machine),
    )


@functools.cache
def _limits(threads: int, instructions: str) -> CpuLimits:
    return CpuLimits.of_machine(threads=threads, instructions=instructions)


def _decays_keys(kernel: RowKernel) -> bool:
    """Whether an erase reads along a key that each of its features' decay changes."""
    return kernel.gate == "key" and kernel.erase == "parallel"
