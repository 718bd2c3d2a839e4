"""The ring convolution against torch's own, and the token shift against a shift."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unspool_kernels.ops.short_conv import short_conv, token_shift

Words = Callable[[int], dict[str, Tensor]]
Normal = Callable[..., Tensor]


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [2, 7, 3]])
@pytest.mark.parametrize("width", [2, 4])
def test_equals_a_causal_convolution(width: int, cuts: list[int], one_sequence: Words, normal: Normal) -> None:
    x, weight, bias = normal(12, 5), normal(5, width), normal(5)
    padded = F.pad(x.T[None], (width - 1, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=5))[0].T
    state, cursor = torch.zeros(1, width - 1, 5, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    outputs = [
        short_conv(part, weight, bias, "silu", state=state, cursor=cursor, **one_sequence(len(part)))
        for part in x.split(cuts)
    ]
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.testing.assert_close(state[0].roll(-int(cursor), 0), x[-(width - 1) :])


def test_token_shift_is_a_shift(one_sequence: Words, normal: Normal) -> None:
    x, state = normal(7, 3), torch.zeros(1, 3, dtype=torch.float64)
    shifted = torch.cat([token_shift(part, state=state, **one_sequence(len(part))) for part in x.split([3, 1, 3])])
    torch.testing.assert_close(shifted, F.pad(x, (0, 0, 1, 0))[:-1])
    torch.testing.assert_close(state[0], x[-1])


def test_gradients_pass_through(one_sequence: Words, normal: Normal) -> None:
    words = one_sequence(5)
    x, weight, bias = (y.requires_grad_() for y in (normal(5, 2), normal(2, 3), normal(2)))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        state, cursor = torch.ones(1, 2, 2, dtype=torch.float64), torch.ones(1, dtype=torch.int32)
        return short_conv(x, weight, bias, "silu", state=state, cursor=cursor, **words)

    assert torch.autograd.gradcheck(run, (x, weight, bias))
