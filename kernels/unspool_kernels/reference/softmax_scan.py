"""Aaren's softmax with a fixed query as a scan over (max, mass, weighted sum). `ops.softmax_scan` has the shapes."""

import torch
from torch import Tensor

from unspool_kernels.contract import Result
from unspool_kernels.reference.packing import Group, map_groups, widen
from unspool_kernels.reference.scan import LogMax, scan


def softmax_scan(scores: Tensor, v: Tensor, *, state: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Result:
    """((o, log_mass), (state,))."""

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        score = scores[group.tokens].transpose(0, 1)  # [T, L, H]
        values = widen(v[group.tokens]).transpose(0, 1)
        carried = widen(rows[0])[None]
        first = (carried[..., 0], carried[..., 1], carried[..., 2:])
        elements = (torch.cat(parts) for parts in zip(first, (score, torch.ones_like(score), values), strict=True))
        m, u, w = (part[1:] for part in scan(LogMax(), tuple(elements)))
        empty = m == -torch.inf
        output = torch.where(empty[..., None], 0.0, w / u[..., None])
        log_mass = torch.where(empty, -torch.inf, m + u.log())
        end = torch.cat([m[-1, ..., None], u[-1, ..., None], w[-1]], dim=-1)
        return (output.transpose(0, 1).to(v.dtype), log_mass.transpose(0, 1)), (end,)

    return map_groups(form, (state,), slots, cu_seqlens)
