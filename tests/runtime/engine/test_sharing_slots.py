"""Slots that are fewer than requests: priorities, states moved out and back, deadlines, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from unspool.engine import Engine, EngineOptions
from unspool.executor import Executor
from unspool.requests import FinishEvent, GenerationRequest, InvalidRequest, SamplingParams

if TYPE_CHECKING:
    from conftest import Answer, GatedExecutor

    RequestOf = Callable[..., GenerationRequest]
    Run = Callable[..., list[Answer]]
    Start = Callable[..., Engine]

SAMPLED = SamplingParams(temperature=1.3, seed=5, frequency_penalty=0.5)


@pytest.mark.parametrize("length", [3, 300])
def test_who_is_moved_out_goes_on_with_the_same_bits(
    executor: Executor,
    gated: type[GatedExecutor],
    start_engine: Start,
    request_of: RequestOf,
    run: Run,
    new_answer: type[Answer],
    length: int,
) -> None:
    """Both while it decodes and while it reads."""
    patient = request_of("patient", length, priority=1, max_tokens=60, sampling=SAMPLED, logprobs=1)
    (alone,) = run(start_engine(executor, max_slots=1, prefill_chunk=16, prefix_cache=0), patient)
    gate, answer = gated(executor), new_answer()
    engine = start_engine(gate, max_slots=1, prefill_chunk=16, prefix_cache=0)
    engine.submit(patient, answer)
    for number in range(3):
        gate.allow(5)
        gate.wait()
        urgent = new_answer()
        engine.submit(request_of(f"urgent{number}", 5), urgent)
        gate.allow(1 + 12)  # one of the patient's, which was on its way
        assert urgent.finish().reason == "length"
    gate.allow()
    answer.finish()
    assert answer.events == alone.events
    assert engine.statistics().preemptions == 3


def test_equals_do_not_move_each_other_out(
    native: Executor, start_engine: Start, request_of: RequestOf, run: Run
) -> None:
    engine = start_engine(native, max_slots=2)
    run(engine, *(request_of(f"r{n}", 20, priority=3) for n in range(6)))
    assert engine.statistics().preemptions == 0


def test_the_urgent_is_answered_before_those_that_came_first(
    native: Executor,
    gated: type[GatedExecutor],
    start_engine: Start,
    request_of: RequestOf,
    new_answer: type[Answer],
) -> None:
    gate = gated(native)
    engine = start_engine(gate, max_slots=1)
    order: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, FinishEvent):
            order.append(event.request_id)  # type: ignore[attr-defined]

    last = new_answer()
    for number in range(3):
        engine.submit(request_of(f"patient{number}", 600, priority=5), note)
    engine.submit(request_of("last", 600, priority=9), last)
    engine.submit(request_of("urgent", 4), note)
    gate.allow()
    last.finish()
    assert order[0] == "urgent" and len(order) == 4


def test_who_has_waited_long_is_not_moved_out_again(
    native: Executor,
    gated: type[GatedExecutor],
    start_engine: Start,
    request_of: RequestOf,
    new_answer: type[Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many urgent requests come one after the other."""
    clock = [0.0]
    monkeypatch.setattr("unspool.engine.engine.time.monotonic", lambda: clock[0])
    gate = gated(native)
    engine = start_engine(gate, max_slots=1, ageing_seconds=10, prefix_cache=0)
    first, patient = new_answer(), new_answer()
    engine.submit(request_of("first", 5), first)
    engine.submit(request_of("patient", 5, priority=3), patient)
    clock[0] = 50.0
    urgent = new_answer()
    engine.submit(request_of("urgent", 5), urgent)
    gate.allow()
    assert patient.finish().reason == urgent.finish().reason == first.finish().reason == "length"
    assert engine.statistics().preemptions == 0


def test_the_urgent_one_passes_by_who_has_aged_but_may_take_no_slot(
    native: Executor,
    gated: type[GatedExecutor],
    start_engine: Start,
    request_of: RequestOf,
    new_answer: type[Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("unspool.engine.engine.time.monotonic", lambda: clock[0])
    gate = gated(native)
    engine = start_engine(gate, max_slots=1, ageing_seconds=10, prefix_cache=0)
    order: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, FinishEvent):
            order.append(event.request_id)

    running = new_answer()
    engine.submit(request_of("running", 5, priority=5, max_tokens=1000), running)
    gate.allow(3)
    gate.wait()
    engine.submit(request_of("aged", 5, priority=9), note)
    clock[0] = 200.0
    engine.submit(request_of("urgent", 5, priority=0), note)
    gate.allow(1 + 12)
    gate.wait()
    assert order == ["urgent"]
    gate.allow()
    assert running.finish().reason == "length"


def test_a_request_that_still_waits_at_its_deadline_expires(
    native: Executor, start_engine: Start, request_of: RequestOf, new_answer: type[Answer]
) -> None:
    engine = start_engine(native, max_slots=1)
    running, waiting, patient = new_answer(), new_answer(), new_answer()
    engine.submit(request_of("running", 5, max_tokens=1_000_000), running)
    running.next()
    engine.submit(request_of("waiting", 5, deadline=0.05), waiting)
    engine.submit(request_of("patient", 5, deadline=600.0), patient)
    assert waiting.finish().reason == "expired"
    engine.cancel("running")
    assert patient.finish().reason == "length"


def test_slots_are_shared_fairly_among_owners(
    native: Executor, start_engine: Start, request_of: RequestOf, new_answer: type[Answer]
) -> None:
    engine = start_engine(native, max_slots=1, prefix_cache=0)
    order: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, FinishEvent):
            order.append(event.request_id[0])  # type: ignore[attr-defined]

    blocker, last = new_answer(), new_answer()
    engine.submit(request_of("blocker", 5, max_tokens=1_000_000), blocker)
    blocker.next()
    for number in range(6):
        engine.submit(request_of(f"greedy{number}", 40, owner="greedy"), note)
    for number in range(2):
        engine.submit(request_of(f"modest{number}", 40, owner="modest"), note)
    engine.submit(request_of("last", 5, priority=1), last)
    engine.cancel("blocker")
    last.finish()
    assert order[:4].count("m") == 2


def test_slots_fit_the_memory_that_was_given(native: Executor) -> None:
    state_bytes = native.new_pool(1).num_bytes
    assert Engine(native, EngineOptions(slot_memory=3 * state_bytes + 1)).num_slots == 3
    assert Engine(native, EngineOptions(max_slots=2, slot_memory=100 * state_bytes)).num_slots == 2
    with pytest.raises(InvalidRequest, match="slot_memory: holds no slot: one state of this model takes"):
        Engine(native, EngineOptions(slot_memory=state_bytes - 1))


def test_a_slot_keeps_nothing_of_whom_it_had_before(
    executor: Executor, start_engine: Start, request_of: RequestOf, run: Run
) -> None:
    engine = start_engine(executor, max_slots=1, prefix_cache=0)
    (before,) = run(engine, request_of("a", 50, logprobs=1))
    for layer in engine._pool.layers:
        for tensor in layer.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    (after,) = run(engine, request_of("a", 50, logprobs=1))
    assert before.events == after.events
