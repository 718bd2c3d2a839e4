"""Sets a layer's bank priorities: weights by regression on the teacher's attention, and what a later token is worth.

The latter is searched by the error of the layer's output on sequences that the weights in question were not fitted on:
weights look better on their own text than they are, and then too old tokens are kept. Running text alone would have
heads forget what it rarely comes back to, so texts of another kind can be searched on beside it. The last tokens alone
are a candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from unspool.bank import BankPriority
from unspool.batch import StepContext, step_context
from unspool.mixer import Heads, LinearizedAttention
from unspool.rotary import Rotary
from unspool_conversion.bank_regression import Moments, token_moments

AGINGS = (0.0003, 0.001, 0.002, 0.004, 0.008, 0.016)


@dataclass(frozen=True)
class BankText:
    """What a layer projects from sequences of text, and what its teacher makes of that [N, T, H_kv, G, D]."""

    heads: Heads
    target: Tensor
    rotary: Rotary
    weights: Sequence[Tensor] | None = None
    """By sequence, the weights that were fitted without it; None where that is all of them."""

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
        return set_bank(mixer, None, (text,))
    total = reduce(Moments.plus, known)
    folds = [total.minus(own).solve() if len(known) > 1 else total.solve() for own in known]
    return set_bank(mixer, total.solve(), (replace(text, weights=folds),))


def set_bank(mixer: LinearizedAttention, weight: Tensor | None, texts: Sequence[BankText]) -> dict[str, Any]:
    """Gives the bank these weights [H_kv, F], or none, and the aging that is best on the texts, which count alike;
    returns what was chosen. Heads for which no aging is better than the last tokens hold those."""
    assert mixer.far is not None and mixer.far.bank is not None
    priority, gram = mixer.far.bank, output_gram(mixer)
    recent = _errors(mixer, texts, gram, None, aging=1.0)
    best = torch.ones(mixer.num_kv_heads, device=gram.device)
    chosen = torch.zeros_like(best)
    if weight is not None:
        for aging in AGINGS:
            tried = _errors(mixer, texts, gram, weight, aging)
            relative = torch.where(recent > 0, tried / recent, 1.0).mean(0)
            chosen = torch.where(relative < best, aging, chosen)
            best = torch.minimum(relative, best)
        priority.weight.copy_(weight)
    _keep(priority, chosen)
    return {"bank_aging": chosen.tolist(), "bank_error_of_longer_window": float(best.mean())}


def output_gram(mixer: LinearizedAttention) -> Tensor:
    """[H_kv, G, D, D]: e^T gram e is what an error e of a head's values adds to the squared error of the layer."""
    weight = mixer.o_proj.weight.unflatten(1, (mixer.num_kv_heads, mixer.group, -1))  # [hidden, H_kv, G, D]
    return torch.einsum("nhgd,nhge->hgde", weight, weight)


def _errors(
    mixer: LinearizedAttention, texts: Sequence[BankText], gram: Tensor, weight: Tensor | None, aging: float
) -> Tensor:
    """The squared error [texts, H_kv] of sinks, window and bank without a state; no weight is all zeros."""
    assert mixer.far is not None and mixer.far.bank is not None
    priority = mixer.far.bank
    priority.aging.fill_(aging)
    errors = gram.new_zeros(len(texts), mixer.num_kv_heads)
    for error, text in zip(errors, texts, strict=True):
        for index in range(len(text.target)):
            if weight is None:
                priority.weight.zero_()
            else:
                priority.weight.copy_(weight if text.weights is None else text.weights[index])
            near = mixer.attend_near(text.sequence(index), text.context(1), None)
            off = near.output.values - text.target[index]
            error += torch.einsum("bthgd,hgde,bthge->h", off, gram, off)
    return errors


def _keep(priority: BankPriority, chosen: Tensor) -> None:
    """Heads for which no aging was better than the last tokens (0) hold those."""
    recent = chosen == 0
    priority.weight[recent] = 0.0
    priority.aging.copy_(torch.where(recent, 1.0, chosen))
