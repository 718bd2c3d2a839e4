"""Fits a layer's bank priorities to the attention that the teacher pays to a token after it has left the window.

A ridge regression, per head, of the logarithm of that attention on the token's key and value. How much a later token is
worth is then searched by the error of the layer's output, on sequences that the weights in question were not fitted on:
weights look better on their own text than they are, and then too old tokens are kept. The last tokens alone are a
candidate.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unspool.bank import BankPriority, features
from unspool.batch import StepContext, step_context
from unspool.mixer import Heads, LinearizedAttention
from unspool.rotary import Rotary

AGINGS = (0.001, 0.002, 0.004, 0.008, 0.016)
RIDGE = 0.1
"""Of each feature's variance: best of six from 0.001 to 1 on other texts, for weights fitted on 4,000 tokens."""
LEAST_ATTENTION = 1e-6
"""Added to the mean attention before its logarithm."""
FEWEST_QUERIES = 64
"""A token that fewer later queries could have seen from beyond the window says nothing."""
_BLOCK = 256


def calibrate_bank(
    mixer: LinearizedAttention, heads: Heads, target: Tensor, context: StepContext, teacher_window: int | None
) -> dict[str, Any]:
    """Sets the bank of a layer whose teacher's attention output is `target`; returns what was chosen."""
    assert mixer.far is not None and mixer.far.bank is not None
    priority = mixer.far.bank
    samples = _samples(heads, context, mixer.spec.window, teacher_window)
    layer = _Layer(mixer, heads, target, context.rotary, output_gram(mixer))
    priority.reset_parameters()
    sequences = range(len(target))
    best = recent = torch.stack([layer.near_error(sequence) for sequence in sequences]).sum(0)
    chosen = torch.zeros(mixer.num_kv_heads)
    if samples is not None:
        folds = [samples.fit(without=sequence if len(sequences) > 1 else None) for sequence in sequences]
        for aging in AGINGS:
            priority.aging.fill_(aging)
            errors = []
            for sequence in sequences:
                priority.weight.copy_(folds[sequence])
                errors.append(layer.near_error(sequence))
            error = torch.stack(errors).sum(0)
            chosen = torch.where(error < best, aging, chosen)
            best = torch.minimum(error, best)
        priority.weight.copy_(samples.fit())
    _keep(priority, chosen)
    ratio = float(best.sum() / recent.sum()) if float(recent.sum()) else 1.0
    return {"bank_aging": chosen.tolist(), "bank_error_of_longer_window": ratio}


def output_gram(mixer: LinearizedAttention) -> Tensor:
    """[H_kv, G, D, D]: e^T gram e is what an error e of a head's values adds to the squared error of the layer."""
    weight = mixer.o_proj.weight.unflatten(1, (mixer.num_kv_heads, mixer.group, -1))  # [hidden, H_kv, G, D]
    return torch.einsum("nhgd,nhge->hgde", weight, weight)


def _keep(priority: BankPriority, chosen: Tensor) -> None:
    """Heads for which no aging was better than the last tokens (0) hold those."""
    recent = chosen == 0
    priority.weight[recent] = 0.0
    priority.aging.copy_(torch.where(recent, 1.0, chosen))


@dataclass(frozen=True)
class _Layer:
    """A layer, what it projects from the text, and what its teacher makes of that."""

    mixer: LinearizedAttention
    heads: Heads
    target: Tensor
    rotary: Rotary
    gram: Tensor

    def near_error(self, sequence: int) -> Tensor:
        """The squared error [H_kv] of sinks, window and bank without a state, on one sequence."""
        heads = Heads(*(part[sequence, None] for part in self.heads))
        context = step_context((1, heads.k.shape[1]), self.rotary, heads.k.dtype, heads.k.device)
        off = self.mixer.attend_near(heads, context, None).output.values - self.target[sequence]
        return torch.einsum("bthgd,hgde,bthge->h", off, self.gram, off)


@dataclass(frozen=True)
class _Samples:
    """Features [B, N, H_kv, 4 D] of tokens and the logarithm of the attention they received [B, N, H_kv], float64."""

    features: Tensor
    wanted: Tensor

    def fit(self, without: int | None = None) -> Tensor:
        """The weights [H_kv, 4 D], fitted on all sequences but one."""
        used = [sequence for sequence in range(len(self.features)) if sequence != without]
        inputs, wanted = self.features[used].flatten(0, 1), self.wanted[used].flatten(0, 1)
        heads = range(inputs.shape[1])
        return torch.stack([_ridge(inputs[:, head], wanted[:, head]) for head in heads]).float()


def _samples(heads: Heads, context: StepContext, window: int, teacher_window: int | None) -> _Samples | None:
    """None where the text has no tokens to fit on."""
    length = heads.k.shape[1]
    queries = length - window - torch.arange(length)  # that may see a token from beyond the window
    if teacher_window is not None:
        queries = queries.clamp(max=teacher_window - window)
    known = queries >= FEWEST_QUERIES
    if not bool(known.any()):
        return None
    received = _attention_received(heads, context, window, teacher_window)
    wanted = (received / queries.clamp_min(1)[:, None] + LEAST_ATTENTION).log()
    return _Samples(features(heads.k, heads.v)[:, known].double(), wanted[:, known].double())


def _ridge(inputs: Tensor, wanted: Tensor) -> Tensor:
    """Weights [F] for inputs [N, F], with an intercept that is not returned: it moves no order."""
    centred = inputs - inputs.mean(0)
    scale = centred.square().mean(0).sqrt().clamp_min(1e-12)
    centred = centred / scale
    moments = centred.T @ centred / len(centred) + RIDGE * torch.eye(centred.shape[1], dtype=centred.dtype)
    slope: Tensor = torch.linalg.solve(moments, centred.T @ (wanted - wanted.mean()) / len(wanted))
    return slope / scale


def _attention_received(heads: Heads, context: StepContext, window: int, teacher_window: int | None) -> Tensor:
    """The teacher's attention to each token from queries that have it outside the window, summed: [B, T, H_kv]."""
    q, k = context.query.apply(heads.q), context.query.apply(heads.k)
    length = k.shape[1]
    positions = torch.arange(length)
    received = torch.zeros(k.shape[:3])
    for sequence, first, last in _query_blocks(k.shape[0], length):
        query = positions[first:last, None]
        seen = positions[:last] <= query
        if teacher_window is not None:
            seen &= positions[:last] > query - teacher_window
        scores = torch.einsum("thgd,jhd->hgtj", q[sequence, first:last], k[sequence, :last]) / math.sqrt(k.shape[-1])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        far = positions[:last] <= query - window
        received[sequence, :last] += (weights * far).sum((1, 2)).T
    return received


def _query_blocks(sequences: int, length: int) -> Iterator[tuple[int, int, int]]:
    for sequence in range(sequences):
        for first in range(0, length, _BLOCK):
            yield sequence, first, min(first + _BLOCK, length)
