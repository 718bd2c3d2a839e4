"""The tokens that only a memory can predict: those that complete a pair of tokens which the same text had before, and
not within reach of the window (the associative recall hits of Zoology, arXiv 2312.04927)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unspool_conversion.evaluation.bootstrap import Bootstrap
from unspool_conversion.evaluation.likelihood import TokenScores, summarize_loss

REPEATED = "repeated beyond the window"
REST = "other tokens at such positions"


def repeated_beyond(tokens: Tensor, window: int, sinks: int) -> Tensor:
    """Which tokens of [T] after the first complete a pair that occurred before, never with its second token where the
    near set of the predicting position has it: bool [T - 1], by the position predicted from."""
    latest: dict[tuple[int, int], int] = {}
    in_sinks: set[tuple[int, int]] = set()
    repeated = []
    ids = tokens.tolist()
    for position, pair in enumerate(zip(ids, ids[1:], strict=False)):
        seen = latest.get(pair)
        repeated.append(seen is not None and seen <= position - window and pair not in in_sinks)
        latest[pair] = position + 1
        if position + 1 < sinks:
            in_sinks.add(pair)
    return torch.tensor(repeated, dtype=torch.bool)


def summarize_recall(
    scores: Mapping[str, TokenScores], sequences: Tensor, bootstrap: Bootstrap, near: tuple[int, int]
) -> dict[str, Any]:
    """The rows' likelihood of repeated pairs, and of the other tokens at positions that a window and sinks, `near`,
    do not cover."""
    window, sinks = near
    repeated = torch.stack([repeated_beyond(tokens, window, sinks) for tokens in sequences])
    beyond = (torch.arange(repeated.shape[1]) >= window + sinks).expand(repeated.shape)
    slices = {REPEATED: repeated & beyond, REST: beyond & ~repeated}
    rows = {
        row: {name: summarize_loss(scores, row, bootstrap, chosen) for name, chosen in slices.items()} for row in scores
    }
    return {"tokens": {name: int(chosen.sum()) for name, chosen in slices.items()}, "rows": rows}
