"""The gated state's chunk form against its definition, token by token in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool_kernels.reference import gated_state


def _inputs(tokens: int, decay_width: int, *, heads: int = 2, group: int = 3, features: int = 5, channels: int = 4):
    generator = torch.Generator().manual_seed(tokens * 31 + decay_width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(tokens, heads, group, features), normal(tokens, heads, features), normal(tokens, heads, channels)
    return q, k, v, -normal(tokens, heads, decay_width).abs(), normal(heads, channels, features)


def _definition(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} diag(a_t) + v_t k_t^T and o_t = S_t q_t, one sequence, head and token at a time."""
    output, state = torch.zeros(*q.shape[:4], v.shape[-1], dtype=q.dtype), state.clone()
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                decay = log_decay[b, t, h].exp().expand(k.shape[-1])
                state[b, h] = state[b, h] @ torch.diag(decay) + torch.outer(v[b, t, h], k[b, t, h])
                for g in range(q.shape[3]):
                    output[b, t, h, g] = state[b, h] @ q[b, t, h, g]
    return output, state


@pytest.mark.parametrize("decay_width", [1, 5])
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 130])
def test_chunk_equals_the_definition(tokens: int, decay_width: int) -> None:
    inputs = _inputs(tokens, decay_width)
    output, state = gated_state.chunk(*inputs)
    expected_output, expected_state = _definition(*inputs)
    torch.testing.assert_close(output, expected_output, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, expected_state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("decay_width", [1, 5])
def test_steps_equal_the_definition(decay_width: int) -> None:
    q, k, v, log_decay, state = _inputs(9, decay_width)
    expected, expected_state = _definition(q, k, v, log_decay, state)
    for t in range(9):
        output, state = gated_state.step(q[:, t], k[:, t], v[:, t], log_decay[:, t], state)
        torch.testing.assert_close(output, expected[:, t], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, expected_state, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6), decay_width=st.sampled_from([1, 5]))
def test_every_split_gives_the_same(cuts: list[int], decay_width: int) -> None:
    q, k, v, log_decay, state = _inputs(sum(cuts), decay_width)
    whole, end = gated_state.chunk(q, k, v, log_decay, state)
    parts = []
    for q_, k_, v_, decay in zip(*(x.split(cuts, dim=1) for x in (q, k, v, log_decay)), strict=True):
        output, state = gated_state.chunk(q_, k_, v_, decay, state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay_width", [1, 5])
def test_float32_stays_finite_and_right_under_violent_decays(decay_width: int) -> None:
    q, k, v, log_decay, state = _inputs(200, decay_width)
    inputs = q, k, v, log_decay * 40, state
    output, end = gated_state.chunk(*(x.float() for x in inputs))
    expected, expected_end = _definition(*inputs)
    assert (output - expected).norm() / expected.norm() < 1e-5
    assert (end - expected_end).norm() / expected_end.norm() < 1e-5


@pytest.mark.parametrize("decay_width", [1, 5])
def test_masked_tokens_leave_the_state_bit_for_bit(decay_width: int) -> None:
    q, k, v, log_decay, state = _inputs(20, decay_width)
    _, end = gated_state.chunk(q, torch.zeros_like(k), v, torch.zeros_like(log_decay), state)
    assert torch.equal(end, state)


@pytest.mark.parametrize("decay_width", [1, 5])
def test_gradients_pass_finite_differences(decay_width: int) -> None:
    inputs = tuple(x.requires_grad_() for x in _inputs(7, decay_width, heads=1, group=1, features=5, channels=2))
    assert torch.autograd.gradcheck(gated_state.chunk, inputs)
