import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from unspool.requests import InvalidRequest, SamplingParams
from unspool.sampling import Sampler, keep_likely, token_logprobs

VOCAB = 200

finite_logits = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40).map(torch.tensor)


def random_logits(seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def draw(params: SamplingParams, logits: Tensor, count: int) -> list[int]:
    sampler = Sampler(params, (), len(logits))
    return [sampler.sample(logits) for _ in range(count)]


def kept_distribution(params: SamplingParams, logits: Tensor) -> Tensor:
    tokens, weights = keep_likely(logits.numpy(), params)
    shares = torch.zeros(len(logits), dtype=torch.float64)
    shares[torch.from_numpy(tokens)] = torch.from_numpy(weights).double()
    return shares / shares.sum()


def warpers(params: SamplingParams) -> list[LogitsProcessor]:
    """transformers' own processors in vLLM's order."""
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(params.temperature)]
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    return chain


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.3),
        SamplingParams(temperature=2.5),
        SamplingParams(top_k=1),
        SamplingParams(top_k=7),
        SamplingParams(top_k=VOCAB + 50),
        SamplingParams(top_p=0.01),
        SamplingParams(top_p=0.7),
        SamplingParams(top_p=0.999),
        SamplingParams(min_p=0.1),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=0.7, min_p=0.02, top_k=20, top_p=0.9),
        SamplingParams(temperature=1.7, top_k=5, top_p=0.5),
    ],
    ids=lambda params: ",".join(
        f"{name}={getattr(params, name):g}" for name in ("temperature", "min_p", "top_k", "top_p")
    ),
)
def test_filters_keep_what_transformers_keeps(params: SamplingParams, seed: int) -> None:
    logits = random_logits(seed)
    scores = logits[None].double()
    for warper in warpers(params):
        scores = warper(torch.empty(1, 0, dtype=torch.int64), scores)
    torch.testing.assert_close(kept_distribution(params, logits), scores[0].softmax(dim=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Over the prompt and what was generated."""
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=penalty), (3, 5, 5), 30)
    oracle = RepetitionPenaltyLogitsProcessor(penalty)
    history = [3, 5, 5]
    for step in range(40):
        logits = random_logits(step % 3, 30)
        expected = int(oracle(torch.tensor([history]), logits[None].clone())[0].argmax())
        assert sampler.sample(logits) == expected
        history.append(expected)


def test_presence_penalty_counts_once_and_only_generated_tokens() -> None:
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1.0), (0, 1), 3)
    logits = torch.tensor([2.0, 1.5, 0.0])
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 0, 0]


def test_frequency_penalty_grows_with_each_occurrence() -> None:
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=1.0), (0, 0, 0), 3)
    logits = torch.tensor([2.0, 1.5, 0.25])
    assert [sampler.sample(logits) for _ in range(6)] == [0, 1, 0, 1, 2, 0]


def test_logit_bias_is_added_before_the_choice() -> None:
    logits = torch.tensor([5.0, 0.0, 0.0])
    assert draw(SamplingParams(temperature=0, logit_bias={2: 6.0}), logits, 1) == [2]
    assert set(draw(SamplingParams(logit_bias={1: -100.0, 0: -100.0}, seed=0), logits, 50)) == {2}


@given(logits=finite_logits)
def test_temperature_zero_takes_the_lowest_of_the_largest(logits: Tensor) -> None:
    assert draw(SamplingParams(temperature=0), logits, 1) == [logits.tolist().index(logits.max().item())]


@given(logits=finite_logits, temperature=st.floats(0.01, 10), seed=st.integers(0, 100))
def test_top_k_of_one_is_greedy(logits: Tensor, temperature: float, seed: int) -> None:
    params = SamplingParams(top_k=1, temperature=temperature, seed=seed)
    assert draw(params, logits, 1) == draw(SamplingParams(temperature=0), logits, 1)


@settings(deadline=None)
@given(
    logits=finite_logits,
    params=st.builds(
        SamplingParams,
        temperature=st.floats(1e-5, 100),
        top_k=st.integers(0, 50),
        top_p=st.floats(1e-12, 1),
        min_p=st.floats(0, 1),
        seed=st.integers(0, 9),
    ),
)
def test_a_choice_is_always_one_of_the_k_largest(logits: Tensor, params: SamplingParams) -> None:
    token = draw(params, logits, 1)[0]
    assert int((logits > logits[token]).sum()) < (params.top_k or len(logits))
    assert len(keep_likely(logits.numpy(), params)[0]) <= (params.top_k or len(logits))


@pytest.mark.parametrize(
    "params", [SamplingParams(seed=3), SamplingParams(seed=5, temperature=1.8, top_k=6, top_p=0.9)]
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(7, 12) / 2
    expected = kept_distribution(params, logits)
    draws = 4000
    counts = Counter(draw(params, logits, draws))
    assert set(counts) <= set(expected.nonzero().squeeze(1).tolist())
    probable = [token for token in range(12) if expected[token] * draws >= 5]
    statistic = sum(
        (counts[token] - draws * float(expected[token])) ** 2 / (draws * float(expected[token])) for token in probable
    )
    assert statistic < chi_square_bound(len(probable) - 1)


def chi_square_bound(freedom: int) -> float:
    """Exceeded once in a thousand (Wilson and Hilferty's approximation)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3)


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_sampled() -> None:
    logits = random_logits(1)
    alone = draw(SamplingParams(seed=11), logits, 30)
    sampler, other = Sampler(SamplingParams(seed=11), (), VOCAB), Sampler(SamplingParams(), (), VOCAB)
    torch.manual_seed(99)
    together = []
    for _ in range(30):
        other.sample(logits)
        together.append(sampler.sample(logits))
    assert together == alone
    assert draw(SamplingParams(seed=12), logits, 30) != alone


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(1000)
    assert draw(SamplingParams(), logits, 20) != draw(SamplingParams(), logits, 20)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_finite_maximum_are_an_error(damage: float, temperature: float) -> None:
    logits = random_logits(0)
    logits[17] = damage
    with pytest.raises(FloatingPointError, match="float32"):
        draw(SamplingParams(temperature=temperature), logits, 1)


def test_tokens_masked_with_minus_infinity_are_never_chosen() -> None:
    logits = torch.full((50,), -math.inf)
    logits[[4, 9]] = torch.tensor([0.0, 0.1])
    assert set(draw(SamplingParams(seed=0, temperature=5.0, repetition_penalty=1.5), logits, 200)) == {4, 9}
    with pytest.raises(FloatingPointError):
        draw(SamplingParams(), torch.full((5,), -math.inf), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_any_float_dtype_are_left_unchanged(dtype: torch.dtype) -> None:
    logits = random_logits(2).to(dtype)
    before = logits.clone()
    params = SamplingParams(
        repetition_penalty=1.2, presence_penalty=0.5, logit_bias={3: 1.0}, top_p=0.9, seed=0, min_tokens=2
    )
    sampler = Sampler(params, (1, 2), VOCAB, stop_ids=frozenset({7}))
    for _ in range(3):
        sampler.sample(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = random_logits(4).to(dtype)
    expected = logits.float().log_softmax(dim=0)
    scores = token_logprobs(logits, 42, 5)
    assert scores.logprob == expected[42].item()
    values = expected.sort(descending=True).values[:5].tolist()
    assert [logprob for _, logprob in scores.top] == values
    assert [expected[token].item() for token, _ in scores.top] == values


@pytest.mark.parametrize(("top", "expected"), [(0, ()), (1, (1,)), (3, (1, 3, 0)), (9, (1, 3, 0, 2, 4))])
def test_the_most_likely_tokens_come_best_first_and_of_equals_the_lower_id(top: int, expected: tuple[int, ...]) -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert tuple(token for token, _ in token_logprobs(logits, 0, top).top) == expected


def test_a_choice_agrees_with_the_best_logprob_when_greedy() -> None:
    for seed in range(20):
        logits = random_logits(seed).bfloat16()
        assert draw(SamplingParams(temperature=0), logits, 1) == [token_logprobs(logits, 0, 1).top[0][0]]


def test_top_k_of_minus_one_keeps_all_tokens() -> None:
    logits = random_logits(0)
    everything = kept_distribution(SamplingParams(top_k=0), logits)
    assert torch.equal(kept_distribution(SamplingParams(top_k=-1), logits), everything)
    assert draw(SamplingParams(top_k=-1, seed=3), logits, 20) == draw(SamplingParams(seed=3), logits, 20)


@pytest.mark.parametrize("top_k", [-2, 1.5])
def test_a_top_k_that_is_no_count_is_refused(top_k: Any) -> None:
    with pytest.raises(InvalidRequest, match="top_k: must be 0 or -1"):
        SamplingParams(top_k=top_k)


@pytest.mark.parametrize("penalty", [0.0, 1e-320, 0.009, 100.1, math.nan])
def test_a_repetition_penalty_that_could_overflow_is_refused(penalty: float) -> None:
    with pytest.raises(InvalidRequest, match="repetition_penalty: must be at least 0.01 and at most 100"):
        SamplingParams(repetition_penalty=penalty)


def test_the_smallest_repetition_penalty_keeps_logits_finite() -> None:
    logits = random_logits(0) * 1e30
    sampler = Sampler(SamplingParams(repetition_penalty=0.01, temperature=0), range(VOCAB), VOCAB)
    assert sampler.sample(logits) == int(logits.argmax())


def test_of_equal_logits_top_k_and_top_p_keep_the_lower_ids() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 1.0])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.4), SamplingParams(top_k=4, top_p=0.5)):
        assert kept_distribution(params, logits).nonzero().squeeze(1).tolist() == [1, 2]
    assert kept_distribution(SamplingParams(top_k=5), logits).nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]


RESUMED = [
    SamplingParams(temperature=0, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.7),
    SamplingParams(temperature=1.3, top_p=0.95, seed=-5),
    SamplingParams(temperature=1.3, repetition_penalty=1.4, frequency_penalty=0.7, seed=(1 << 63) - 1, min_tokens=6),
    SamplingParams(),
]


@pytest.mark.parametrize("params", RESUMED)
@pytest.mark.parametrize("done", [0, 1, 5, 9])
def test_a_replayed_sampler_goes_on_as_the_first_did(params: SamplingParams, done: int) -> None:
    rows = [random_logits(step, 30) for step in range(16)]
    stop_ids = frozenset(range(10))
    first = Sampler(params, (3, 5), 30, stop_ids=stop_ids)
    tokens = [first.sample(row) for row in rows]
    second = Sampler(replace(params, seed=first.seed), (3, 5), 30, stop_ids=stop_ids)
    second.replay(tokens[:done])
    assert [second.sample(row) for row in rows[done:]] == tokens[done:]


def test_all_64_bits_of_a_seed_count() -> None:
    logits = torch.zeros(1000)
    seeds = (0, 1, 1 << 32, -1, 1 << 62, -(1 << 63))
    assert len({tuple(draw(SamplingParams(seed=seed), logits, 4)) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_cannot_be_chosen_before_the_least_number_of_tokens(temperature: float) -> None:
    logits = torch.zeros(20)
    logits[[4, 9]] = 50.0
    params = SamplingParams(temperature=temperature, min_tokens=3, seed=1)
    sampler = Sampler(params, (4,), 20, stop_ids=frozenset({4, 9, 20, 10**6}))
    tokens = [sampler.sample(logits) for _ in range(6)]
    assert not {4, 9} & set(tokens[:3])
    assert set(tokens[3:]) <= {4, 9}


@pytest.mark.parametrize("min_tokens", [-1, 1.5, 1 << 21])
def test_a_least_number_of_tokens_that_is_no_count_is_refused(min_tokens: Any) -> None:
    with pytest.raises(InvalidRequest, match="min_tokens: must be a count between 0 and"):
        SamplingParams(min_tokens=min_tokens)
