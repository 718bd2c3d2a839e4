"""First-order scans as associative trees: h_t = a_t h_{t-1} + x_t, and RWKV-4's stabilised quotient of two of them.

`ops.diagonal_scan` has the shapes.
"""

import torch
from torch import Tensor

from unspool_kernels.contract import Result
from unspool_kernels.reference.packing import Group, map_groups, widen
from unspool_kernels.reference.scan import Diagonal, Exponential, scan


def diagonal_scan(
    x: Tensor, decay: Tensor, *, read: Tensor | None = None, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Result:
    """((h or y,), (state,)). No decay is divided by or put into logs, so signs and zeros are fine."""
    paired = state.dim() == 4
    per_token = x.dim()

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        inputs = _number(x[group.tokens], paired).transpose(0, 1)  # [T, L, C, M]
        a = _number(decay[group.tokens] if decay.dim() == per_token else decay, paired)
        a = a.transpose(0, 1) if decay.dim() == per_token else a.expand_as(inputs)
        total, h = scan(Diagonal(), (a, inputs))
        h = (h + total * _number(rows[0], paired)).transpose(0, 1)  # [L, T, C, M]
        output = h
        if read is not None:
            weight = _number(read[group.tokens] if read.dim() == per_token else read, paired)
            output = (weight * h).sum(-1)
            output = 2.0 * output.real if paired else output
        return (_real(output).to(x.dtype),), (_real(h[:, -1]),)

    return map_groups(form, (state,), slots, cu_seqlens)


def exponential_scan(
    k: Tensor, v: Tensor, *, decay: Tensor, bonus: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor
) -> Result:
    """((y,), (state,))."""
    monoid = Exponential()

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        keys, values = (widen(x[group.tokens]).transpose(0, 1) for x in (k, v))  # [T, L, C]
        one = torch.ones_like(keys)
        numerator, denominator, maximum = (x[None] for x in widen(rows[0]).unbind(-1))
        first = (torch.zeros_like(maximum), maximum, numerator, denominator)
        tokens = (decay.expand_as(keys), keys, values, one)
        through = scan(monoid, tuple(torch.cat(parts) for parts in zip(first, tokens, strict=True)))  # state after each
        before = tuple(part[:-1] for part in through)
        # The token itself enters its own output with the bonus in place of the decay.
        _, _, top, bottom = monoid.combine(before, (torch.zeros_like(keys), keys + bonus, values, one))
        _, end, a, b = (part[-1] for part in through)
        return ((top / bottom).transpose(0, 1).to(k.dtype),), (torch.stack([a, b, end], dim=-1),)

    return map_groups(form, (state,), slots, cu_seqlens)


def _number(x: Tensor, paired: bool) -> Tensor:
    return torch.view_as_complex(widen(x).contiguous()) if paired else widen(x)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x
