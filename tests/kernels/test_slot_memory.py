"""Gated slot attention against its definition in float64."""

import pytest
import torch
from torch import Tensor

from unspool_kernels.reference import slot_memory

SCALE = 0.7


def _inputs(tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    heads, group, channels, slots = 2, 3, 4, 6
    return (
        normal(tokens, heads, group, channels),
        normal(tokens, heads, channels),
        normal(tokens, heads, channels),
        -normal(tokens, heads, slots).abs(),
        normal(heads, slots, channels),
        normal(heads, slots, channels),
    )


def _definition(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys, values, outputs = keys.clone(), values.clone(), torch.zeros_like(q)
    for t in range(q.shape[1]):
        keep = log_decay[:, t].exp()[..., None]
        keys = keep * keys + (1 - keep) * k[:, t, :, None]
        values = keep * values + (1 - keep) * v[:, t, :, None]
        for g in range(q.shape[3]):
            weights = (SCALE * torch.einsum("bhmk,bhk->bhm", keys, q[:, t, :, g])).softmax(-1)
            outputs[:, t, :, g] = torch.einsum("bhm,bhmv->bhv", weights, values)
    return outputs


@pytest.mark.parametrize("tokens", [1, 16, 17, 50])
def test_chunk_and_steps_equal_the_definition(tokens: int) -> None:
    q, k, v, log_decay, keys, values = _inputs(tokens)
    expected = _definition(q, k, v, log_decay, keys, values)
    output, end_keys, end_values = slot_memory.chunk(q, k, v, log_decay, keys, values, SCALE)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for t in range(tokens):
        output, keys, values = slot_memory.step(q[:, t], k[:, t], v[:, t], log_decay[:, t], keys, values, SCALE)
        torch.testing.assert_close(output, expected[:, t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end_keys, keys, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end_values, values, rtol=1e-10, atol=1e-10)


def test_a_token_with_no_decay_writes_nothing() -> None:
    q, k, v, log_decay, keys, values = _inputs(5)
    _, end_keys, end_values = slot_memory.chunk(q, k, v, torch.zeros_like(log_decay), keys, values, SCALE)
    assert torch.equal(end_keys, keys)
    assert torch.equal(end_values, values)
