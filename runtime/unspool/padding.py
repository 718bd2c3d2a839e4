"""Batches whose attention mask pads left, right or between: real tokens are moved to the front, outputs moved back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """Where the real tokens of a batch [B, T] stand. Without padding it does nothing."""

    lengths: list[int] | None
    order: Tensor | None
    """Column that each place takes its token from [B, T]: the real ones first, in order."""

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, tokens: int) -> "Compaction":
        """From a mask [B, at least T] whose last T columns belong to these tokens.

        Raises ValueError for a mask of another shape.
        """
        if mask is None:
            return cls(None, None)
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected [{batch}, {tokens} or more]")
        real = mask[:, mask.shape[1] - tokens :].bool()
        if bool(real.all()):
            return cls(None, None)
        return cls(real.sum(1).tolist(), torch.argsort((~real).to(torch.int8), dim=1, stable=True))

    def compact(self, x: Tensor) -> Tensor:
        """Moves real tokens of x [B, T, C] to the front."""
        return x if self.order is None else x.gather(1, self.order[..., None].expand_as(x))

    def restore(self, x: Tensor) -> Tensor:
        """Moves outputs [B, T, C] back to their columns."""
        if self.order is None:
            return x
        return x.gather(1, self.order.argsort(1)[..., None].expand_as(x))

    def check_positions(self, position_ids: Tensor, starts: list[int] | None) -> None:
        """Raises ValueError when a real token's position is not the number of real tokens before it."""
        batch, tokens = position_ids.shape
        start = torch.tensor(starts if starts is not None else [0] * batch, device=position_ids.device)
        expected = (start[:, None] if starts is not None else 0) + torch.arange(tokens, device=position_ids.device)
        given = position_ids if self.order is None else position_ids.gather(1, self.order.expand(batch, tokens))
        lengths = torch.tensor(self.lengths or [tokens] * batch, device=position_ids.device)
        real = torch.arange(tokens, device=position_ids.device) < lengths[:, None]
        if not bool(((given == expected) | ~real).all()):
            raise ValueError(
                "position_ids: a recurrent model's positions count the tokens consumed; do not pass others"
            )
