"""Prompts that start from others' checkpoints: the same answers, and less reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unspool.engine import Engine
from unspool.executor import Executor
from unspool.requests import GenerationRequest, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from conftest import Answer, GatedExecutor

    RequestOf = Callable[..., GenerationRequest]
    Run = Callable[..., list[Answer]]
    Start = Callable[..., Engine]


def scores(answer: Answer) -> list[object]:
    return [(event.token, event.logprobs) for event in answer.events if isinstance(event, TokenEvent)]


def prompt(*parts: tuple[int, int]) -> tuple[int, ...]:
    """So many tokens each of several repeating texts."""
    return tuple((start * 7 + i * (start + 3)) % 61 for start, length in parts for i in range(length))


def test_a_conversation_is_read_once(executor: Executor, start_engine: Start, request_of: RequestOf, run: Run) -> None:
    engine = start_engine(executor, prefill_chunk=16)  # a torch executor goes on from multiples of 16 in prompts only
    text: tuple[int, ...] = ()
    for turn in range(4):
        text = (*text, *prompt((turn, 64)))
        (answer,) = run(engine, request_of("turn", 1, prompt=text, max_tokens=33))
        assert answer.end.prompt_tokens - answer.prompt.cached_tokens <= (65 if executor.shared_chunk else 65 + 33 + 16)
        text = (*text, *answer.tokens)
    assert engine.statistics().cached_tokens > 250


def test_an_equal_prompt_is_not_read_again(
    executor: Executor, start_engine: Start, request_of: RequestOf, run: Run
) -> None:
    engine = start_engine(executor, prefill_chunk=16)
    first, second = (run(engine, request_of("same", 100, logprobs=3))[0] for _ in range(2))
    assert (first.prompt.cached_tokens, first.prompt.cache_miss) == (0, "cold")
    assert (second.prompt.cached_tokens, second.prompt.cache_miss) == (100, None)
    assert scores(first) == scores(second)


def test_equal_prompts_in_flight_are_read_once(
    executor: Executor,
    gated: type[GatedExecutor],
    start_engine: Start,
    request_of: RequestOf,
    new_answer: type[Answer],
) -> None:
    gate = gated(executor)
    engine = start_engine(gate, max_slots=4, prefill_chunk=16)
    answers = [new_answer() for _ in range(8)]
    for number, answer in enumerate(answers):
        engine.submit(request_of(f"n{number}", 300, sampling=SamplingParams(seed=number)), answer)
    gate.allow()
    for answer in answers:
        answer.finish()
    assert sorted(answer.prompt.cached_tokens for answer in answers) == [0, *[300] * 7]
    assert len({tuple(answer.tokens) for answer in answers}) > 1


def test_prompts_that_part_are_read_together_up_to_there(
    native: Executor, gated: type[GatedExecutor], start_engine: Start, request_of: RequestOf, new_answer: type[Answer]
) -> None:
    gate = gated(native)
    engine = start_engine(gate, max_slots=4, prefill_chunk=16)
    answers = [new_answer() for _ in range(4)]
    for number, answer in enumerate(answers):
        engine.submit(request_of(f"p{number}", 1, prompt=prompt((1, 300), (number + 2, 40))), answer)
    gate.allow()
    for answer in answers:
        answer.finish()
    assert sorted(answer.prompt.cached_tokens for answer in answers) == [0, 300, 300, 300]


def test_a_shifted_tail_still_finds_the_checkpoint_before_it(
    native: Executor, start_engine: Start, request_of: RequestOf, run: Run
) -> None:
    engine = start_engine(native, prefill_chunk=256)
    shared = prompt((1, 4096))
    (first,) = run(engine, request_of("a", 1, prompt=(*shared, *prompt((2, 30)))))
    (second,) = run(engine, request_of("b", 1, prompt=(*shared[:-100], *prompt((3, 130)))))
    assert first.prompt.cached_tokens == 0
    assert 4126 - 256 <= second.prompt.cached_tokens <= 3996 and second.prompt.cache_miss == "diverged"
    # Where the two parted there is now a checkpoint, for the third one.
    (third,) = run(engine, request_of("c", 1, prompt=(*shared[:-100], *prompt((4, 130)))))
    assert third.prompt.cached_tokens >= 3996


def test_hints_leave_checkpoints(native: Executor, start_engine: Start, request_of: RequestOf, run: Run) -> None:
    engine = start_engine(native)
    run(engine, request_of("a", 1, prompt=prompt((1, 77), (2, 20)), checkpoints=(77,)))
    (answer,) = run(engine, request_of("b", 1, prompt=prompt((1, 77), (3, 20))))
    assert answer.prompt.cached_tokens == 77


def test_nothing_is_shared_between_owners_or_with_who_does_not_want_it(
    executor: Executor, start_engine: Start, request_of: RequestOf, run: Run
) -> None:
    engine = start_engine(executor)
    run(engine, request_of("a", 100, owner="a"))
    (other,) = run(engine, request_of("b", 100, owner="b"))
    (without,) = run(engine, request_of("c", 100, owner="a", use_cache=False))
    assert (other.prompt.cached_tokens, other.prompt.cache_miss) == (0, "cold")
    assert (without.prompt.cached_tokens, without.prompt.cache_miss) == (0, "disabled")
    assert other.tokens == without.tokens


def test_who_follows_goes_on_alone_when_its_leader_is_cancelled(
    native: Executor,
    gated: type[GatedExecutor],
    start_engine: Start,
    request_of: RequestOf,
    run: Run,
    new_answer: type[Answer],
) -> None:
    gate = gated(native)
    engine = start_engine(gate, max_slots=2, prefill_chunk=8)
    leader, follower = new_answer(), new_answer()
    engine.submit(request_of("leader", 3000), leader)
    engine.submit(request_of("follower", 3000), follower)
    gate.allow(3)
    gate.wait()
    engine.cancel("leader")
    gate.allow()
    assert leader.finish().reason == "cancelled"
    assert follower.finish().reason == "length"
    (alone,) = run(engine, request_of("alone", 3000, use_cache=False))
    assert follower.tokens == alone.tokens


@pytest.fixture(scope="module")
def expected(native: Executor, run: Run) -> Callable[[GenerationRequest], list[object]]:
    """What a request gets alone from an engine that remembers nothing."""
    from unspool.engine import EngineOptions

    engine = Engine(native, EngineOptions(prefix_cache=0))
    engine.start()
    known: dict[tuple[int, ...], list[object]] = {}

    def ask(request: GenerationRequest) -> list[object]:
        if request.prompt not in known:
            known[request.prompt] = scores(run(engine, request)[0])
        return known[request.prompt]

    return ask


PARTS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([3, 40, 90])), min_size=1, max_size=4)
BURSTS = st.lists(st.lists(st.tuples(PARTS, st.integers(-1, 1)), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bursts=BURSTS, states=st.sampled_from([2, 8, 1000]))
def test_every_request_gets_the_bits_that_it_gets_alone(
    bursts: list[list[tuple[list[tuple[int, int]], int]]],
    states: int,
    native: Executor,
    start_engine: Start,
    request_of: RequestOf,
    run: Run,
    expected: Callable[[GenerationRequest], list[object]],
) -> None:
    """Whatever was asked before or is asked meanwhile, with priorities that take slots away, in a small cache."""
    state_bytes = native.new_pool(1).num_bytes
    engine = start_engine(native, max_slots=2, prefill_chunk=32, prefix_cache=states * state_bytes + 4096)
    for burst in bursts:
        requests = [
            request_of(f"r{n}", 1, prompt=prompt(*parts), priority=priority, logprobs=1)
            for n, (parts, priority) in enumerate(burst)
        ]
        for request, answer in zip(requests, run(engine, *requests), strict=True):
            assert scores(answer) == expected(request)
    engine.shutdown()
