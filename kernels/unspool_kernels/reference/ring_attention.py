"""`ring_window` over packed sequences and slots. `ops.ring_attention` has the shapes."""

import torch
from torch import Tensor

from unspool_kernels.contract import Result
from unspool_kernels.reference import ring_window
from unspool_kernels.reference.packing import Group, map_groups, widen


def ring_attention(
    q: Tensor,
    sink_q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    sinks: int,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> Result:
    """((o, log_mass, row_max), (keys, values))."""
    window = keys.shape[2] - sinks

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        start = positions[group.sequences].long()
        length = torch.full_like(start, group.tokens.shape[1])
        past_keys, past_values = (widen(_only_written(row, start)) for row in rows)
        new_keys, new_values = (widen(x[group.tokens].to(keys.dtype)) for x in (k, v))
        history = ring_window.read_history(past_keys, past_values, start, window, sinks)
        history = ring_window.with_new_sinks(history, new_keys, new_values, start, length)
        near = ring_window.chunk(
            widen(q[group.tokens]), widen(sink_q[group.tokens]), new_keys, new_values, history, start
        )
        all_keys, all_values = (row.clone() for row in rows)
        ring_window.write(all_keys, all_values, new_keys, new_values, start, length, sinks)
        return (near.values.to(q.dtype), near.log_mass, near.row_max), (all_keys, all_values)

    return map_groups(form, (keys, values), slots, cu_seqlens)


def _only_written(rows: Tensor, start: Tensor) -> Tensor:
    """With zeros in the rows that a sequence at position start has not filled: a NaN there would pass any mask."""
    filled = torch.arange(rows.shape[2], device=rows.device) < start[:, None]
    return rows.masked_fill(~filled[:, None, :, None], 0.0)
