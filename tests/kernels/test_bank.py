"""The bank against its definition: at every token, the highest priorities among what has left the window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool_kernels.reference import bank

HEADS, GROUP, CHANNELS = 2, 3, 4
WINDOW, SINKS = 3, 1


def made(tokens: int, seed: int) -> tuple[Tensor, bank.Leaving]:
    """Queries at positions 0 .. tokens - 1 of two equal-length sequences, and what leaves their windows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    positions = (torch.arange(tokens) - WINDOW).expand(2, -1)
    leaving = bank.Leaving(
        normal(2, tokens, HEADS, CHANNELS),
        normal(2, tokens, HEADS, CHANNELS),
        normal(2, tokens, HEADS).float(),
        positions,
        positions >= SINKS,
    )
    return normal(2, tokens, HEADS, GROUP, CHANNELS), leaving


def empty(size: int) -> bank.Entries:
    rows = torch.zeros(2, HEADS, size, CHANNELS, dtype=torch.float64)
    return bank.Entries(rows, rows.clone(), torch.zeros(2, HEADS, size), torch.zeros(2, HEADS, size, dtype=torch.int32))


def held_by_definition(leaving: bank.Leaving, aging: Tensor, size: int, reach: int) -> list[list[list[set[int]]]]:
    """Positions in the bank [sequence][head][token], by sorting."""
    worth = bank.priority(leaving.scores.transpose(1, 2), leaving.positions[:, None], aging)
    tokens = leaving.positions.shape[1]

    def held(sequence: int, head: int, token: int) -> set[int]:
        known = [p for p in range(SINKS, token - WINDOW + 1) if token - p < reach]
        # An entry that was evicted never returns, so the rule is applied from the beginning.
        inside: list[int] = []
        for now in range(token + 1):
            inside = [p for p in inside if now - p < reach]
            if (p := now - WINDOW) >= SINKS:
                inside = sorted([*inside, p], key=lambda p: -float(worth[sequence, head, p + WINDOW]))[:size]
        assert set(inside) <= set(known)
        return set(inside)

    return [[[held(b, h, t) for t in range(tokens)] for h in range(HEADS)] for b in range(2)]


def attend(q: Tensor, leaving: bank.Leaving, sequence: int, head: int, positions: set[int]) -> Tensor:
    rows = [p + WINDOW for p in sorted(positions)]
    keys, values = leaving.keys[sequence, rows, head], leaving.values[sequence, rows, head]
    return (q @ keys.T * CHANNELS**-0.5).softmax(-1) @ values


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 6), tokens=st.integers(1, 40), reach=st.sampled_from([12, 1000]), seed=st.integers(0, 99))
def test_a_chunk_attends_to_the_highest_priorities_and_evicts_the_rest(
    size: int, tokens: int, reach: int, seed: int
) -> None:
    q, leaving = made(tokens, seed)
    aging = torch.tensor([0.0, 0.05])
    start, filled = empty(size), torch.zeros(2, dtype=torch.int64)
    decided = bank.plan(start, leaving, aging, filled, reach, WINDOW)
    output, evicted = bank.chunk(q, start, leaving, decided)
    held = held_by_definition(leaving, aging, size, reach)
    for sequence in range(2):
        for head in range(HEADS):
            gone: set[int] = set()
            for token in range(tokens):
                inside = held[sequence][head][token]
                left = set(range(SINKS, token - WINDOW + 1))
                if len(left) > size:
                    gone.add(int(evicted.positions[sequence, token, head]))
                assert gone == left - inside
                if inside:
                    expected = attend(q[sequence, token, head], leaving, sequence, head, inside)
                    assert torch.allclose(output.values[sequence, token, head], expected)
                else:
                    assert bool(output.log_mass[sequence, token, head].isneginf().all())


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 6),
    cut=st.integers(1, 29),
    reach=st.sampled_from([12, 1000]),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_chunks_and_steps_leave_the_same_bank_and_evict_the_same_tokens(
    size: int, cut: int, reach: int, seed: int, ties: bool
) -> None:
    q, leaving = made(30, seed)
    aging = torch.tensor([0.02, 0.3])
    if ties:
        leaving, aging = leaving._replace(scores=leaving.scores.round()), torch.zeros(2)
    whole, stepped, split = empty(size), empty(size), empty(size)

    def filled(start: int) -> Tensor:
        return torch.full((2,), start - WINDOW - SINKS).clamp(0, size)

    decided = bank.plan(whole, leaving, aging, filled(0), reach, WINDOW)
    output, evicted = bank.chunk(q, whole, leaving, decided)
    bank.write(whole, leaving, decided)
    for first, last in ((0, cut), (cut, 30)):
        part = bank.Leaving(*(x[:, first:last] for x in leaving))
        decided = bank.plan(split, part, aging, filled(first), reach, WINDOW)
        output_of_part, _ = bank.chunk(q[:, first:last], split, part, decided)
        bank.write(split, part, decided)
        assert torch.allclose(output_of_part.values, output.values[:, first:last])
    for token in range(30):
        part = bank.Leaving(*(x[:, token : token + 1] for x in leaving))
        step = bank.step(stepped, part, aging, filled(token), reach, WINDOW)
        if token - WINDOW - SINKS >= size:
            assert torch.equal(step.positions[:, 0], evicted.positions[:, token])
            assert torch.equal(step.keys[:, 0], evicted.keys[:, token])
    for name in bank.Entries._fields:
        assert torch.equal(getattr(whole, name), getattr(stepped, name))
        assert torch.equal(getattr(whole, name), getattr(split, name))


def test_without_weights_the_bank_is_a_longer_window() -> None:
    q, leaving = made(20, 0)
    leaving = leaving._replace(scores=torch.zeros_like(leaving.scores))
    start = empty(4)
    decided = bank.plan(start, leaving, torch.ones(HEADS), torch.zeros(2, dtype=torch.int64), 1000, WINDOW)
    _, evicted = bank.chunk(q, start, leaving, decided)
    full = torch.arange(20) - WINDOW - SINKS >= 4
    assert torch.equal(evicted.positions[0, full, 0], leaving.positions[0, full] - 4)


def test_an_empty_bank_has_finite_gradients() -> None:
    q, leaving = made(5, 0)
    start, keys = empty(2), leaving.keys.clone().requires_grad_()
    leaving = leaving._replace(keys=keys)
    decided = bank.plan(start, leaving, torch.ones(HEADS), torch.zeros(2, dtype=torch.int64), 1000, WINDOW)
    output, _ = bank.chunk(q, start, leaving, decided)
    torch.where(output.log_mass.isneginf(), 0.0, output.log_mass).sum().backward()
    assert keys.grad is not None and bool(keys.grad.isfinite().all())
    assert bool(keys.grad.ne(0).any())


@pytest.mark.parametrize("worth", [1.0, -1.0])
def test_nothing_enters_a_full_bank_of_higher_priorities(worth: float) -> None:
    _, leaving = made(1, 0)
    leaving = leaving._replace(
        scores=torch.full_like(leaving.scores, worth), positions=torch.full((2, 1), 9), mask=torch.ones(2, 1).bool()
    )
    entries = empty(2)
    evicted = bank.step(entries, leaving, torch.zeros(HEADS), torch.tensor([2, 2]), 1000, WINDOW)
    assert bool((evicted.positions == (0 if worth > 0 else 9)).all())
