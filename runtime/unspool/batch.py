"""Where the tokens of one forward pass stand: their positions, lengths and slots, and what follows from those alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.rotary import Rotary, Rotation
from unspool.state import SlotRows, StatePool


@dataclass(frozen=True)
class StepContext:
    """What every layer needs to know of a batch [B, T]; sequence b's first length[b] tokens are real."""

    start: Tensor
    """Position of each sequence's first token [B]."""
    length: Tensor
    positions: Tensor
    """[B, T]"""
    valid: Tensor
    """[B, T]: which tokens are real."""
    rows: SlotRows | None
    """The slots that hold the sequences' state; None computes from an empty state and keeps none."""
    is_step: bool
    """Whether every sequence has exactly one token, and a slot."""
    query: Rotation
    sink: Rotation
    rotary: Rotary
    _leaving: dict[int, Rotation] = field(default_factory=dict)

    def unrotate_leaving(self, window: int) -> Rotation:
        """What undoes the rotation of the token that leaves the window at each position."""
        if window not in self._leaving:
            position = (self.positions - window).clamp_min(0)
            dtype = torch.promote_types(self.query.cos.dtype, torch.float32)
            self._leaving[window] = self.rotary.inverse(position, dtype)
        return self._leaving[window]


def step_context(
    shape: tuple[int, int],
    rotary: Rotary,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[int] | None = None,
    slots: tuple[StatePool, Sequence[int]] | None = None,
) -> StepContext:
    """The context of tokens [B, T]. `lengths` defaults to T each; `slots` names the pool and one slot a sequence."""
    batch, tokens = shape
    real = list(lengths) if lengths is not None else [tokens] * batch
    starts = [slots[0].positions[slot] for slot in slots[1]] if slots else [0] * batch
    start, length = torch.tensor(starts, device=device), torch.tensor(real, device=device)
    offset = torch.arange(tokens, device=device)
    positions = start[:, None] + offset
    return StepContext(
        start=start,
        length=length,
        positions=positions,
        valid=offset < length[:, None],
        rows=SlotRows(slots[1], device) if slots else None,
        is_step=slots is not None and tokens == 1 and all(n == 1 for n in real),
        query=rotary.rotation(positions, dtype),
        sink=rotary.sink_rotation(positions, dtype),
        rotary=rotary,
    )
