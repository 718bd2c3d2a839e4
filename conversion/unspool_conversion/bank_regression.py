"""The attention that tokens receive after they have left the window, and its ridge regression on their keys and values.

Sums over tokens are all that is kept of a text, so it may be of any length.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unspool.bank import features
from unspool.batch import StepContext
from unspool.mixer import Heads

RIDGE = 0.1
"""Of each feature's variance: best of six from 0.001 to 1 on other texts, for weights fitted on 4,000 tokens."""
LEAST_ATTENTION = 1e-4
"""Added to the attention before its logarithm."""
FEWEST_QUERIES = 64
"""A token that fewer later queries could have seen from beyond the window says nothing."""
_BLOCK = 256
_ROUNDING = 1e-12
"""A smaller share of a feature's mean square is not variance."""


class Moments(NamedTuple):
    """Sums over the tokens of a text, per key-value head, in float64: their tokens [H_kv], features x [H_kv, F], the
    wanted priority y [H_kv], x x^T [H_kv, F, F] and x y [H_kv, F]."""

    tokens: Tensor
    inputs: Tensor
    wanted: Tensor
    squares: Tensor
    products: Tensor

    @classmethod
    def of(cls, inputs: Tensor, wanted: Tensor) -> "Moments":
        """Of features [N, H_kv, F] and priorities [N, H_kv]."""
        x, y = inputs.double().transpose(0, 1), wanted.double().T
        count = torch.full((x.shape[0],), float(x.shape[1]), dtype=torch.float64, device=x.device)
        return cls(count, x.sum(1), y.sum(1), x.transpose(1, 2) @ x, (y[:, None] @ x)[:, 0])

    def plus(self, other: "Moments") -> "Moments":
        return Moments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: "Moments") -> "Moments":
        return Moments(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))

    def solve(self) -> Tensor:
        """The weights [H_kv, F] of the regression, with an intercept that is not returned: it moves no order. Features
        that do not vary get none."""
        count = self.tokens[:, None]
        mean = self.inputs / count
        squares = self.squares / count[..., None]
        covariance = squares - mean[:, :, None] * mean[:, None]
        variance = covariance.diagonal(dim1=1, dim2=2)
        varies = variance > _ROUNDING * squares.diagonal(dim1=1, dim2=2)
        scale = variance.clamp_min(0).sqrt().masked_fill(~varies, torch.inf)
        correlation = covariance / (scale[:, :, None] * scale[:, None])
        ridge = RIDGE * torch.eye(scale.shape[1], dtype=scale.dtype, device=scale.device)
        slope = (self.products / count - mean * (self.wanted / self.tokens)[:, None]) / scale
        solved: Tensor = torch.linalg.solve(correlation + ridge, slope)
        return (solved / scale).float()


def token_moments(heads: Heads, context: StepContext, window: int, teacher_window: int | None) -> Moments | None:
    """The moments of a batch of whole sequences; None when they have no tokens to fit on.

    What is wanted of a token is the logarithm of the most attention that any of the teacher's queries pays to it from
    beyond the window, as in KVzip (Kim et al., NeurIPS 2025): a fact that one question asks for matters as much as a
    word that every query looks at a little, and predictions become better than with the mean.
    """
    length = heads.k.shape[1]
    queries = length - window - torch.arange(length, device=heads.k.device)
    if teacher_window is not None:
        queries = queries.clamp(max=teacher_window - window)
    known = queries >= FEWEST_QUERIES
    if not bool(known.any()):
        return None
    wanted = (_most_attention(heads, context, window, teacher_window) + LEAST_ATTENTION).log()
    return Moments.of(features(heads.k, heads.v)[:, known].flatten(0, 1), wanted[:, known].flatten(0, 1))


def _most_attention(heads: Heads, context: StepContext, window: int, teacher_window: int | None) -> Tensor:
    """The teacher's largest attention to each token from queries that have it outside the window: [B, T, H_kv]."""
    q, k = context.query.apply(heads.q), context.query.apply(heads.k)
    length = k.shape[1]
    positions = torch.arange(length, device=k.device)
    most = torch.zeros(k.shape[:3], device=k.device)
    for sequence, first, last in _query_blocks(k.shape[0], length):
        query = positions[first:last, None]
        seen = positions[:last] <= query
        if teacher_window is not None:
            seen &= positions[:last] > query - teacher_window
        scores = torch.einsum("thgd,jhd->hgtj", q[sequence, first:last], k[sequence, :last]) / math.sqrt(k.shape[-1])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        far = positions[:last] <= query - window
        seen_most = (weights * far).amax((1, 2)).T
        most[sequence, :last] = torch.maximum(most[sequence, :last], seen_most)
    return most


def _query_blocks(sequences: int, length: int) -> Iterator[tuple[int, int, int]]:
    for sequence in range(sequences):
        for first in range(0, length, _BLOCK):
            yield sequence, first, min(first + _BLOCK, length)
