"""Packed tokens as dense groups: sequences of one length are stacked, so the reference forms never see padding."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unspool_kernels.contract import Result


class Group(NamedTuple):
    """L sequences of T tokens each: which of the call's they are [L], their slots [L], their tokens [L, T]."""

    sequences: Tensor
    slots: Tensor
    tokens: Tensor


Form = Callable[[Group, tuple[Tensor, ...]], Result]
"""From the state rows [L, ...] of a group to its outputs [L, T, ...] and the rows after its last token."""


def map_groups(form: Form, states: tuple[Tensor, ...], slots: Tensor, cu_seqlens: Tensor) -> Result:
    """Runs a form on every group: outputs [N, ...], zero for padding sequences, and states, the given ones kept."""
    groups = group_by_length(slots, cu_seqlens)
    results = [form(group, tuple(state[group.slots] for state in states)) for group in groups]
    tokens = torch.cat([group.tokens.flatten() for group in groups])
    rows = torch.cat([group.slots for group in groups])
    outputs = tuple(
        part[0]
        .new_zeros(int(cu_seqlens[-1]), *part[0].shape[2:])
        .index_copy(0, tokens, torch.cat([output.flatten(0, 1) for output in part]))
        for part in zip(*(outputs for outputs, _ in results), strict=True)
    )
    ends = tuple(
        state.index_copy(0, rows, torch.cat(part).to(state.dtype))
        for state, part in zip(states, zip(*(ends for _, ends in results), strict=True), strict=True)
    )
    return outputs, ends


def group_by_length(slots: Tensor, cu_seqlens: Tensor) -> list[Group]:
    """The live sequences that have tokens; one group of none when there are no such, so that shapes stay known."""
    starts, live = cu_seqlens.tolist(), slots.tolist()
    by_length: dict[int, list[int]] = {}
    for sequence, slot in enumerate(live):
        length = starts[sequence + 1] - starts[sequence]
        if slot >= 0 and length:
            by_length.setdefault(length, []).append(sequence)
    device = slots.device
    return [
        Group(
            torch.tensor(members, dtype=torch.long, device=device),
            torch.tensor([live[s] for s in members], dtype=torch.long, device=device),
            torch.tensor([starts[s] for s in members], dtype=torch.long, device=device)[:, None]
            + torch.arange(length, device=device),
        )
        for length, members in (by_length or {1: []}).items()
    ]


def widen(x: Tensor) -> Tensor:
    """In the dtype sums are formed in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
