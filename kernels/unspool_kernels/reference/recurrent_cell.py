"""Elman, LSTM, GRU and sLSTM (arXiv 2405.04517) cells, token by token. `ops.recurrent_cell` has the shapes."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool_kernels.contract import Result
from unspool_kernels.reference.packing import Group, map_groups, widen

States = tuple[Tensor, ...]


def recurrent_cell(
    x: Tensor,
    weight: Tensor,
    *,
    cell: Literal["elman", "lstm", "gru", "slstm"],
    bias: Tensor | None = None,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> Result:
    """((h,), (state,))."""
    step = CELLS[cell]
    matrix, offset = widen(weight), 0.0 if bias is None else widen(bias)

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        inputs = widen(x[group.tokens])  # [L, T, H, gates, D]
        states: States = widen(rows[0]).unbind(-2)
        outputs = []
        for t in range(inputs.shape[1]):
            recurrent = torch.einsum("hgoi,lhi->lhgo", matrix, states[0]) + offset
            states = step(inputs[:, t].unbind(-2), recurrent.unbind(-2), states)
            outputs.append(states[0])
        return (torch.stack(outputs, dim=1).to(x.dtype),), (torch.stack(states, dim=-2),)

    return map_groups(form, (state,), slots, cu_seqlens)


def _elman(x: States, r: States, states: States) -> States:
    return ((x[0] + r[0]).tanh(),)


def _lstm(x: States, r: States, states: States) -> States:
    i, f, g, o = (a + b for a, b in zip(x, r, strict=True))
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: States, r: States, states: States) -> States:
    reset, update = (x[0] + r[0]).sigmoid(), (x[1] + r[1]).sigmoid()
    new = (x[2] + reset * r[2]).tanh()
    return ((1.0 - update) * new + update * states[0],)


def _slstm(x: States, r: States, states: States) -> States:
    i, f, z, o = (a + b for a, b in zip(x, r, strict=True))
    _, c, n, m = states
    kept = F.logsigmoid(f) + m
    maximum = torch.maximum(kept, i)
    forget, enter = (kept - maximum).exp(), (i - maximum).exp()
    c, n = forget * c + enter * z.tanh(), forget * n + enter
    return o.sigmoid() * c / n, c, n, maximum


CELLS: dict[str, Callable[[States, States, States], States]] = {
    "elman": _elman,
    "lstm": _lstm,
    "gru": _gru,
    "slstm": _slstm,
}
"""From the pre-activations, R h + bias, and the states to the new states; the first of these is the output."""
