"""The ring against attention over all positions with a mask, and its exact join with the part it has forgotten."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unspool_kernels.ops.ring_attention import ring_attention
from unspool_kernels.reference.merge import merge
from unspool_kernels.reference.ring_attention import ring_attention as reference

Normal = Callable[..., Tensor]
LENGTH, HEADS, GROUP, CHANNELS = 40, 2, 3, 4


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [N, H, G, D] over k, v [N, H, D] where seen [N, N]: values and log-sum-exp."""
    scores = torch.einsum("nhgd,mhd->nhgm", q, k) * CHANNELS**-0.5
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return torch.einsum("nhgm,mhd->nhgd", scores.softmax(-1).nan_to_num(0.0), v), scores.logsumexp(-1)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("cuts", [[40], [1] * 40, [13, 1, 26]])
def test_equals_masked_attention_and_joins_with_the_far_part(
    sinks: int, window: int, cuts: list[int], normal: Normal
) -> None:
    q, k, v = normal(LENGTH, HEADS, GROUP, CHANNELS), normal(LENGTH, HEADS, CHANNELS), normal(LENGTH, HEADS, CHANNELS)
    keys, values = (torch.full((2, HEADS, sinks + window, CHANNELS), torch.nan, dtype=torch.float64) for _ in range(2))
    outputs, start = [], 0
    for size in cuts:
        part = slice(start, start + size)
        outputs.append(
            ring_attention(
                q[part],
                q[part],
                k[part],
                v[part],
                keys=keys,
                values=values,
                positions=torch.tensor([start], dtype=torch.int32),
                sinks=sinks,
                slots=torch.tensor([1], dtype=torch.int32),
                cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
            )
        )
        start += size
    o, log_mass, row_max = (torch.cat(parts) for parts in zip(*outputs, strict=True))

    t, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    causal, near = j <= t, (j < sinks) | (j > t - window)
    expected, mass = attend(q, k, v, causal & near)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(log_mass, mass)
    assert bool((row_max <= log_mass).all())
    far, far_mass = attend(q, k, v, causal & ~near)
    torch.testing.assert_close(merge(o, log_mass, far, far_mass), attend(q, k, v, causal)[0])


def test_sinks_are_seen_with_their_own_query(normal: Normal) -> None:
    q, sink_q, k, v = normal(3, 1, 1, 4), normal(3, 1, 1, 4), normal(3, 1, 4), normal(3, 1, 4)
    o, _, _ = ring_attention(
        q,
        sink_q,
        k,
        v,
        keys=torch.zeros(1, 1, 3, 4, dtype=torch.float64),
        values=torch.zeros(1, 1, 3, 4, dtype=torch.float64),
        positions=torch.zeros(1, dtype=torch.int32),
        sinks=1,
        slots=torch.zeros(1, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
    )
    scores = torch.stack([sink_q[2, 0, 0] @ k[0, 0], q[2, 0, 0] @ k[1, 0], q[2, 0, 0] @ k[2, 0]]) * 4**-0.5
    torch.testing.assert_close(o[2, 0, 0], scores.softmax(-1) @ v[:, 0])


def test_gradients_reach_the_buffers_and_come_from_them(normal: Normal) -> None:
    """Distillation trains through a text in pieces: what an earlier piece wrote still has its gradient."""
    k, v = normal(4, 1, 3).requires_grad_(), normal(4, 1, 3).requires_grad_()
    q = normal(4, 1, 2, 3).requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (torch.zeros(1, 1, 4, 3, dtype=torch.float64) for _ in range(2))
        outputs = []
        for start in (0, 2):
            part = slice(start, start + 2)
            (o, log_mass, _), (keys, values) = reference(
                q[part],
                q[part],
                k[part],
                v[part],
                keys=keys,
                values=values,
                positions=torch.tensor([start], dtype=torch.int32),
                sinks=1,
                slots=torch.zeros(1, dtype=torch.int32),
                cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
            )
            outputs += [o, log_mass[..., None]]
        return torch.cat(outputs, dim=-1)

    assert torch.autograd.gradcheck(run, (q, k, v))
