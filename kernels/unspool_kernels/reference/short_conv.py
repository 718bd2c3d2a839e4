"""The causal depthwise convolution over a ring, and the token shift. `ops.short_conv` has the shapes."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool_kernels.contract import Result
from unspool_kernels.reference.packing import Group, map_groups, widen


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["none", "silu"] = "none",
    *,
    state: Tensor,
    cursor: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> Result:
    """((y,), (state, cursor))."""
    taps = widen(weight).T  # [W, C], oldest first

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        ring, oldest = rows
        length, depth = group.tokens.shape[1], ring.shape[1]
        order = (oldest[:, None] + torch.arange(depth, device=ring.device)) % depth  # [L, W - 1]
        inputs = x[group.tokens]
        past = torch.cat([_permute(ring, order), inputs.to(ring.dtype)], dim=1)  # as the state stores them
        output = widen(inputs) * taps[-1]
        for tap in range(depth):
            output = output + widen(past[:, tap : tap + length]) * taps[tap]
        if bias is not None:
            output = output + widen(bias)
        if activation == "silu":
            output = F.silu(output)
        newest = (oldest + length) % depth
        places = (torch.arange(depth, device=ring.device) - newest[:, None]) % depth  # the order, turned around
        return (output.to(x.dtype),), (_permute(past[:, length:], places), newest)

    return map_groups(form, (state, cursor), slots, cu_seqlens)


def token_shift(x: Tensor, *, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Result:
    """((x_{t-1},), (state,))."""

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        inputs = torch.cat([rows[0][:, None], x[group.tokens].to(state.dtype)], dim=1)
        return (inputs[:, :-1].to(x.dtype),), (inputs[:, -1],)

    return map_groups(form, (state,), slots, cu_seqlens)


def _permute(rows: Tensor, order: Tensor) -> Tensor:
    """Rows [L, W - 1, C] of each sequence in the order [L, W - 1]."""
    return rows.gather(1, order.long()[..., None].expand_as(rows))
