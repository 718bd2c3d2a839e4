"""Aaren's recurrence is softmax attention with a fixed query."""

from collections.abc import Callable

import torch
from torch import Tensor

from unspool_kernels.ops.softmax_scan import FRESH_SOFTMAX, softmax_scan

Words = Callable[[int], dict[str, Tensor]]
Normal = Callable[..., Tensor]


def fresh(heads: int, channels: int) -> Tensor:
    row = [*FRESH_SOFTMAX[:2], *[FRESH_SOFTMAX[2]] * channels]
    return torch.tensor(row, dtype=torch.float64).repeat(1, heads, 1)


def test_equals_softmax_over_each_prefix(one_sequence: Words, normal: Normal) -> None:
    scores, v = 30 * normal(23, 2), normal(23, 2, 4)
    o, log_mass = softmax_scan(scores, v, state=fresh(2, 4), **one_sequence(23))
    for t in range(23):
        weights = scores[: t + 1].softmax(0)
        torch.testing.assert_close(o[t], (weights[..., None] * v[: t + 1]).sum(0))
        torch.testing.assert_close(log_mass[t], scores[: t + 1].logsumexp(0))


def test_masked_scores_count_for_nothing(one_sequence: Words, normal: Normal) -> None:
    scores, v = normal(4, 1), normal(4, 1, 3)
    scores[[0, 2]] = -torch.inf
    o, log_mass = softmax_scan(scores, v, state=fresh(1, 3), **one_sequence(4))
    assert bool((o[0] == 0).all()) and log_mass[0].item() == -torch.inf
    torch.testing.assert_close(o[1:3], v[[1, 1]])
    torch.testing.assert_close(o[3, 0], (scores[[1, 3]].softmax(0) * v[[1, 3], 0]).sum(0))


def test_gradients_pass_through(one_sequence: Words, normal: Normal) -> None:
    scores, v = normal(6, 2).requires_grad_(), normal(6, 2, 3).requires_grad_()
    words = one_sequence(6)
    assert torch.autograd.gradcheck(lambda *given: softmax_scan(*given, state=fresh(2, 3), **words), (scores, v))
