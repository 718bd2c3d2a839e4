"""Cases of `ops.ring_attention`: below, across and beyond the window, with and without sinks."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unspool_kernels.laws.case import Case
from unspool_kernels.laws.samples import Samples, Sizes
from unspool_kernels.ops.ring_attention import ring_attention

SETTINGS = ((0, 4), (2, 5), (3, 1), (4, 32))
"""Sinks and window."""


def attention_cases(sizes: Sizes) -> list[Case]:
    return [_ring(sizes, sinks, window) for sinks, window in SETTINGS]


def _ring(sizes: Sizes, sinks: int, window: int) -> Case:
    """Rows that a sequence has not filled hold NaN, as the rows of a slot that another text has left may."""
    name = f"ring-{sinks}-sinks-window-{window}"
    draw = Samples(name, sizes)
    n, heads, channels, rows = sizes.tokens, sizes.heads, sizes.channels, sinks + window
    positions = draw.integers(2 * rows, len(sizes.lengths))
    positions[: len(sizes.lengths) // 2] = 0
    filled = torch.zeros(sizes.pool, 1, 1, 1, dtype=torch.int32)
    filled[draw.slots.long()] = positions[:, None, None, None]
    unfilled = torch.arange(rows)[:, None] >= filled

    def buffer() -> Tensor:
        return draw.normal(sizes.pool, heads, rows, channels).masked_fill(unfilled, torch.nan)

    return Case(
        name=name,
        oracle=partial(ring_attention, backend="reference"),
        tokens={
            "q": draw.normal(n, heads, sizes.group, channels),
            "sink_q": draw.normal(n, heads, sizes.group, channels),
            "k": draw.normal(n, heads, channels),
            "v": draw.normal(n, heads, channels),
        },
        constants={"sinks": sinks},
        states={"keys": buffer(), "values": buffer()},
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh={"keys": torch.tensor(torch.nan), "values": torch.tensor(torch.nan)},
        first=_first,
        positions=positions,
    )


def _first(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """A token alone sees itself; as a sink, if there are any."""
    query = given["sink_q"] if given["sinks"] else given["q"]
    score = (query * given["k"][:, :, None]).sum(-1) * query.shape[-1] ** -0.5
    return given["v"][:, :, None].expand_as(query), score, score
