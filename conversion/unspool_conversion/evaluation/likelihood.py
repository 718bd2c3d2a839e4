"""How well each row predicts held-out text, token by token, and how near its predictions are to the teacher's."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.errors import UserError
from unspool_conversion.evaluation.bootstrap import Bootstrap, Interval
from unspool_conversion.evaluation.positions import position_ranges
from unspool_conversion.evaluation.readers import HEAD_BLOCK, Reader
from unspool_conversion.evaluation.variants import EQUAL_BYTES, TEACHER, WINDOW_ONLY

FAR, ALL = "far", "all"
"""Beside the ranges of positions: the positions that have a far part, and all."""


@dataclass(frozen=True)
class TokenScores:
    """Of the prediction of each token after the first [S, T - 1]: negative log-likelihood and KL divergence from the
    teacher in nats, and whether the likeliest token is the teacher's."""

    loss: Tensor
    divergence: Tensor
    agreement: Tensor


@torch.inference_mode()
def score_tokens(
    readers: Mapping[str, Reader], sequences: Tensor, progress: Callable[[], object]
) -> dict[str, TokenScores]:
    """Scores every row on sequences [S, T], one text at a time. `progress` is called once a row and text.

    Raises UserError when a row's predictions are not finite.
    """
    scores: dict[str, list[Tensor]] = {name: [] for name in readers}
    for tokens in sequences:
        hidden = {}
        for name, reader in readers.items():
            hidden[name] = reader.hidden(tokens)[:-1]
            progress()
        for name, score in _score_text(readers, hidden, tokens[1:]).items():
            if not bool(score.isfinite().all()):
                raise UserError(f"the row {name} computes NaN or infinite values on this text; check the checkpoint")
            scores[name].append(score)
    return {name: TokenScores(*torch.stack(parts, dim=1)) for name, parts in scores.items()}


def _score_text(readers: Mapping[str, Reader], hidden: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Of every row, [3, T]: what TokenScores holds."""
    blocks: dict[str, list[Tensor]] = {name: [] for name in readers}
    for low in range(0, targets.shape[0], HEAD_BLOCK):
        part = slice(low, low + HEAD_BLOCK)
        expected = readers[TEACHER].logits(hidden[TEACHER][part]).log_softmax(-1)
        for name, reader in readers.items():
            actual = expected if name == TEACHER else reader.logits(hidden[name][part]).log_softmax(-1)
            blocks[name].append(_score_block(actual, expected, targets[part]).cpu())
    return {name: torch.cat(parts, dim=1) for name, parts in blocks.items()}


def _score_block(actual: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
    divergence = F.kl_div(actual, expected, reduction="none", log_target=True).sum(-1)
    agreement = (actual.argmax(-1) == expected.argmax(-1)).to(divergence.dtype)
    return torch.stack([F.nll_loss(actual, targets, reduction="none"), divergence, agreement])


def positions_to_tell_apart(length: int, near_tokens: int) -> dict[str, tuple[int, int]]:
    """The columns of the tables: name to positions from which a token is predicted."""
    ranges = {f"{low}-{high}": (low, high) for low, high in position_ranges(length)}
    return ranges | {FAR: (near_tokens, length), ALL: (0, length)}


def summarize_likelihood(
    scores: Mapping[str, TokenScores], bootstrap: Bootstrap, columns: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """For every row and range of positions, every measure as an interval."""
    shape = next(iter(scores.values())).loss.shape
    places = {name: _between(shape, *ends) for name, ends in columns.items()}
    near = columns[FAR][0]
    rows = {
        row: {
            place: summarize_loss(scores, row, bootstrap, chosen) | _closeness(scores[row], bootstrap, chosen)
            for place, chosen in places.items()
        }
        for row in scores
    }
    return {"near_tokens": near, "positions": {name: list(ends) for name, ends in columns.items()}, "rows": rows}


def summarize_loss(
    scores: Mapping[str, TokenScores], row: str, bootstrap: Bootstrap, chosen: Tensor
) -> dict[str, dict[str, float] | None]:
    """A row's negative log-likelihood over chosen tokens [S, T - 1], its perplexity, its differences from both kinds
    of window, and the share that it closes of the gap between window and teacher, where there is one."""
    loss, window = scores[row].loss, scores[WINDOW_ONLY].loss
    gap = window - scores[TEACHER].loss
    mean, whole_gap = bootstrap.mean(loss, chosen), bootstrap.mean(gap, chosen)
    closed = bootstrap.ratio(_sums(window - loss, chosen), _sums(gap, chosen)) if is_gap(whole_gap) else None
    return {
        "nll": as_record(mean),
        "perplexity": as_record(mean and Interval(*(math.exp(end) for end in mean))),
        "minus_window_only": as_record(bootstrap.mean(loss - window, chosen)),
        "minus_equal_bytes": as_record(bootstrap.mean(loss - scores[EQUAL_BYTES].loss, chosen)),
        "gap_closed": as_record(closed),
    }


SMALLEST_GAP = 1e-4
"""Nats a token. Below it the window is as good as the teacher, and rounding would pass for a share of the gap."""


def is_gap(gap: Interval | None) -> bool:
    """Whether the teacher predicts better than the window alone for sure."""
    return gap is not None and gap.low > SMALLEST_GAP


def as_record(interval: Interval | None) -> dict[str, float] | None:
    """An interval as JSON has it."""
    return interval._asdict() if interval is not None else None


def _closeness(scores: TokenScores, bootstrap: Bootstrap, chosen: Tensor) -> dict[str, dict[str, float] | None]:
    return {
        "divergence": as_record(bootstrap.mean(scores.divergence, chosen)),
        "agreement": as_record(bootstrap.mean(scores.agreement, chosen)),
    }


def _between(shape: torch.Size, low: int, high: int) -> Tensor:
    position = torch.arange(shape[1])
    return ((position >= low) & (position < high)).expand(shape)


def _sums(values: Tensor, chosen: Tensor) -> Tensor:
    return (values.double() * chosen).sum(1)
