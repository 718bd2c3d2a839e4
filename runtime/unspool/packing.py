"""Packed tokens on the device: whose they are, where they stand, and what follows from those alone.

The values of these tensors are never asked for, so that what is made of them can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from unspool.batch import StepContext
from unspool.rotary import Rotary


@dataclass(frozen=True)
class PackedTokens:
    """Tokens [N] of S sequences, those of sequence s at cu_seqlens[s] .. cu_seqlens[s + 1], all on the device.

    int32 are positions [S] of each sequence's first token, slots [S] (-1: padding) and cu_seqlens [S + 1].
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    longest: int
    """No sequence has more tokens."""

    @classmethod
    def of(
        cls, tokens: Sequence[Sequence[int]], positions: Sequence[int], slots: Sequence[int], device: torch.device
    ) -> Self:
        ends = [0, *accumulate(map(len, tokens))]
        flat = [token for sequence in tokens for token in sequence]
        return cls(
            tokens=torch.tensor(flat, device=device),
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int32, device=device),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
            longest=max(map(len, tokens)),
        )


@dataclass(frozen=True)
class PackedContext:
    """What every layer needs to know of a pass."""

    batch: PackedTokens
    rows: StepContext
    """The tokens as a batch [N, 1]; those of padding sequences are not valid."""
    slot: Tensor
    """[N]: where each token's state is, a slot of no meaning for padding."""
    offset: Tensor
    """[N]: how many tokens of its sequence come before each one in this pass."""

    @classmethod
    def of(cls, batch: PackedTokens, rotary: Rotary) -> Self:
        order = torch.arange(batch.tokens.shape[0], device=batch.tokens.device, dtype=torch.int32)
        sequence = torch.searchsorted(batch.cu_seqlens[1:], order, right=True)
        slot, offset = batch.slots[sequence].long(), order - batch.cu_seqlens[sequence]
        positions = (batch.positions[sequence] + offset).long()[:, None]
        rows = StepContext(
            start=positions[:, 0],
            length=torch.ones_like(slot),
            positions=positions,
            valid=(slot >= 0)[:, None],
            rows=None,
            is_step=False,
            query=rotary.rotation(positions, torch.float32),
            sink=rotary.sink_rotation(positions, torch.float32),
            rotary=rotary,
        )
        return cls(batch, rows, slot.clamp_min(0), offset)
