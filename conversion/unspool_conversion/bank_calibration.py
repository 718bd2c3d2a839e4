"""Sets a layer's bank priorities: weights by regression on the teacher's attention, and what a later token is worth.

The latter is searched by the error of the layer's output on sequences that the weights in question were not fitted on:
weights look better on their own text than they are, and then too old tokens are kept. The last tokens alone are a
candidate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from unspool.bank import BankPriority
from unspool.batch import StepContext, step_context
from unspool.mixer import Heads, LinearizedAttention
from unspool.rotary import Rotary
from unspool_conversion.bank_regression import Moments, token_moments

AGINGS = (0.001, 0.002, 0.004, 0.008, 0.016)


@dataclass(frozen=True)
class BankText:
    """What a layer projects from sequences of text, and what its teacher makes of that [N, T, H_kv, G, D]."""

    heads: Heads
    target: Tensor
    rotary: Rotary

    def sequence(self, index: int) -> Heads:
        return Heads(*(part[index, None] for part in self.heads))

    def context(self, sequences: int) -> StepContext:
        keys = self.heads.k
        return step_context((sequences, keys.shape[1]), self.rotary, keys.dtype, keys.device)


def calibrate_bank(mixer: LinearizedAttention, text: BankText, teacher_window: int | None) -> dict[str, Any]:
    """Sets the bank of a layer from a few sequences; returns what was chosen."""
    sequences = range(len(text.target))
    context = text.context(1)
    each = [token_moments(text.sequence(index), context, mixer.spec.window, teacher_window) for index in sequences]
    known = [moments for moments in each if moments is not None]
    if not known:
        return set_bank(mixer, text, None)
    total = reduce(Moments.plus, known)
    folds = [total.minus(own).solve() if len(known) > 1 else total.solve() for own in known]
    return set_bank(mixer, text, total.solve(), folds)


def set_bank(
    mixer: LinearizedAttention, text: BankText, weight: Tensor | None, folds: Sequence[Tensor] | None = None
) -> dict[str, Any]:
    """Gives the bank these weights [H_kv, F], or none, and the aging that is best on the text, where sequence i is read
    with the weights folds[i]; returns what was chosen. Heads for which no aging is better than the last tokens hold
    those."""
    assert mixer.far is not None and mixer.far.bank is not None
    priority, gram = mixer.far.bank, output_gram(mixer)
    sequences = range(len(text.target))

    def error(weight_of: Callable[[int], Tensor], aging: float) -> Tensor:
        priority.aging.fill_(aging)
        total = torch.zeros(mixer.num_kv_heads, device=gram.device)
        for index in sequences:
            priority.weight.copy_(weight_of(index))
            total += _near_error(mixer, text, index, gram)
        return total

    best = recent = error(lambda _: torch.zeros_like(priority.weight), 1.0)
    chosen = torch.zeros_like(best)
    if weight is not None:
        for aging in AGINGS:
            tried = error(lambda index: weight if folds is None else folds[index], aging)
            chosen = torch.where(tried < best, aging, chosen)
            best = torch.minimum(tried, best)
        priority.weight.copy_(weight)
    _keep(priority, chosen)
    ratio = float(best.sum() / recent.sum()) if float(recent.sum()) else 1.0
    return {"bank_aging": chosen.tolist(), "bank_error_of_longer_window": ratio}


def output_gram(mixer: LinearizedAttention) -> Tensor:
    """[H_kv, G, D, D]: e^T gram e is what an error e of a head's values adds to the squared error of the layer."""
    weight = mixer.o_proj.weight.unflatten(1, (mixer.num_kv_heads, mixer.group, -1))  # [hidden, H_kv, G, D]
    return torch.einsum("nhgd,nhge->hgde", weight, weight)


def _near_error(mixer: LinearizedAttention, text: BankText, index: int, gram: Tensor) -> Tensor:
    """The squared error [H_kv] of sinks, window and bank without a state, on one sequence."""
    near = mixer.attend_near(text.sequence(index), text.context(1), None)
    off = near.output.values - text.target[index]
    return torch.einsum("bthgd,hgde,bthge->h", off, gram, off)


def _keep(priority: BankPriority, chosen: Tensor) -> None:
    """Heads for which no aging was better than the last tokens (0) hold those."""
    recent = chosen == 0
    priority.weight[recent] = 0.0
    priority.aging.copy_(torch.where(recent, 1.0, chosen))
