"""The near set's attention against a dense masked softmax in float64, for any split, start and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool_kernels.reference import ring_window
from unspool_kernels.reference.merge import merge

HEADS, GROUP, CHANNELS = 2, 3, 4


class Buffers:
    """Two sequences' near rows, fed in chunks as a layer feeds them. Unused rows hold huge values on purpose."""

    def __init__(self, window: int, sinks: int) -> None:
        self.window, self.sinks = window, sinks
        self.keys = torch.full((2, HEADS, sinks + window, CHANNELS), 1e6, dtype=torch.float64)
        self.values = self.keys.clone()
        self.start = torch.zeros(2, dtype=torch.int64)

    def feed(self, q: Tensor, k: Tensor, v: Tensor, length: Tensor | None = None) -> ring_window.NearOutput:
        length = torch.full((2,), q.shape[1]) if length is None else length
        past = ring_window.read_history(self.keys, self.values, self.start, self.window, self.sinks)
        history = ring_window.with_new_sinks(past, k, v, self.start, length)
        output = ring_window.chunk(q, q, k, v, history, self.start)
        ring_window.write(self.keys, self.values, k, v, self.start, length, self.sinks)
        self.start = self.start + length
        return output

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> ring_window.NearOutput:
        row = ring_window.row_of(self.start, self.window, self.sinks)
        pair = torch.arange(2)
        self.keys[pair, :, row], self.values[pair, :, row] = k[:, 0], v[:, 0]
        output = ring_window.step(q[:, 0], q[:, 0], self.keys, self.values, self.start, self.sinks)
        self.start = self.start + 1
        return output


def _inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, tokens, HEADS, *shape, generator=generator, dtype=torch.float64)

    return normal(GROUP, CHANNELS), normal(CHANNELS), normal(CHANNELS)


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Softmax over positions j <= t with j < sinks or j > t - window; its values and log-sum-exp."""
    scores = torch.einsum("bthgd,bjhd->bthgj", q, k) / CHANNELS**0.5
    t, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    visible = (j <= t) & ((j < sinks) | (j > t - window))
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return torch.einsum("bthgj,bjhd->bthgd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 3), (16, 4), (200, 4), (3, 7)])
@pytest.mark.parametrize("tokens", [1, 4, 37, 150])
def test_one_chunk_equals_dense_attention(window: int, sinks: int, tokens: int) -> None:
    q, k, v = _inputs(tokens)
    output = Buffers(window, sinks).feed(q, k, v)
    values, log_mass = _dense(q, k, v, window, sinks)
    torch.testing.assert_close(output.values, values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.log_mass, log_mass, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    window=st.integers(1, 20),
    sinks=st.integers(0, 6),
)
def test_every_split_equals_dense_attention(cuts: list[int], window: int, sinks: int) -> None:
    q, k, v = _inputs(sum(cuts))
    buffers, parts, start = Buffers(window, sinks), [], 0
    for size in cuts:
        part = slice(start, start + size)
        feed = buffers.step if size == 1 else buffers.feed
        parts.append(feed(q[:, part], k[:, part], v[:, part]).values)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), _dense(q, k, v, window, sinks)[0], rtol=1e-9, atol=1e-9)


def test_padding_writes_nothing_and_later_tokens_do_not_see_it() -> None:
    q, k, v = _inputs(40)
    buffers = Buffers(8, 3)
    first = buffers.feed(q[:, :10], k[:, :10], v[:, :10], torch.tensor([10, 2]))
    before = buffers.keys.clone()
    buffers.feed(q[:, 20:25], k[:, 20:25], v[:, 20:25], torch.tensor([0, 0]))
    assert torch.equal(buffers.keys, before)
    rest = buffers.feed(q[:, 10:], k[:, 10:], v[:, 10:])
    dense_first, _ = _dense(q[:1], k[:1], v[:1], 8, 3)
    torch.testing.assert_close(torch.cat([first.values, rest.values], 1)[:1], dense_first, rtol=1e-10, atol=1e-10)
    kept = [0, 1, *range(10, 40)]
    dense_second, _ = _dense(q[1:, kept], k[1:, kept], v[1:, kept], 8, 3)
    torch.testing.assert_close(rest.values[1:], dense_second[:, 2:], rtol=1e-10, atol=1e-10)


def test_merging_two_shards_is_one_softmax() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(7, 20, generator=generator, dtype=torch.float64) * 5
    values = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    near, far = scores[:, :12], scores[:, 12:]
    merged = merge(near.softmax(-1) @ values[:12], near.logsumexp(-1), far.softmax(-1) @ values[12:], far.logsumexp(-1))
    torch.testing.assert_close(merged, scores.softmax(-1) @ values, rtol=1e-12, atol=1e-12)


def test_merging_an_empty_shard_changes_no_bit() -> None:
    near = torch.randn(5, 4)
    merged = merge(near, torch.randn(5), torch.zeros(5, 4), torch.full((5,), -torch.inf))
    assert torch.equal(merged, near)
