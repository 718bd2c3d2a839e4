"""The real model's answers: the same alone, among sixteen others, moved out of a slot and back, and after a restart."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from unspool.engine import Engine, EngineOptions
from unspool.executor import Executor
from unspool.loading import LoadedModel
from unspool.local import LocalOptions, open_executor
from unspool.requests import EngineEvent, FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from unspool.sizes import ByteSize
from unspool.text import render_chat

QUESTIONS = [
    "What is a spool?",
    "Name three rivers of Europe, and say where each of them reaches the sea.",
    "Write one sentence about the weather.",
    "What is 7 times 8?",
    "Translate 'good morning' into French.",
    "List the colours of the rainbow in order, each with something that has it.",
    "Who was Ada Lovelace?",
    "Give me a word that rhymes with thread.",
]
TOKENS = 12


@pytest.fixture(scope="module")
def opened(smollm2: Path) -> tuple[LoadedModel, Executor]:
    return open_executor(smollm2, LocalOptions(quant="int8"))


@pytest.fixture(scope="module")
def requests(opened: tuple[LoadedModel, Executor]) -> list[GenerationRequest]:
    """Seventeen: long and short, greedy and sampled, some after the same system message, of four priorities."""
    tokenizer = opened[0].tokenizer
    made = []
    for number in range(17):
        messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
        if number % 3 == 0:
            story = " ".join(f"Chapter {chapter}: nothing happened." for chapter in range(10 + 5 * (number % 4)))
            messages.insert(0, {"role": "system", "content": f"You know this book. {story}"})
        sampling = SamplingParams(temperature=0.0) if number % 4 else SamplingParams(temperature=0.8, seed=number)
        made.append(
            GenerationRequest(
                request_id=f"r{number}",
                prompt=tuple(render_chat(tokenizer, messages)),
                max_tokens=TOKENS,
                sampling=sampling,
                logprobs=0,
                priority=number % 4,
            )
        )
    return made


@pytest.fixture(scope="module")
def alone(opened: tuple[LoadedModel, Executor], requests: list[GenerationRequest]) -> list[list[object]]:
    """Each with the engine for itself, which remembers nothing of those before."""
    with_engine = _engine(opened[1], max_slots=1, prefix_cache=ByteSize(0))
    engine = next(with_engine)
    answers = [_run(engine, [request])[0] for request in requests]
    next(with_engine, None)
    return answers


def _engine(executor: Executor, **options: object) -> Iterator[Engine]:
    engine = Engine(executor, EngineOptions(**options))  # type: ignore[arg-type]
    engine.start()
    yield engine
    engine.shutdown()


def _run(engine: Engine, requests: list[GenerationRequest], first: int = 0) -> list[list[object]]:
    """Tokens and their log-probabilities, of requests that are submitted together; but before the others so many, until
    one of these has begun to decode."""
    events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
    begun = threading.Event()

    def note(event: EngineEvent) -> None:
        events.put(event)
        if isinstance(event, TokenEvent):
            begun.set()

    for request in requests[:first]:
        engine.submit(request, note)
    assert not first or begun.wait(600)
    for request in requests[first:]:
        engine.submit(request, note)
    answers: dict[str, list[object]] = {request.request_id: [] for request in requests}
    left = len(requests)
    while left:
        event = events.get(timeout=600)
        if isinstance(event, TokenEvent):
            answers[event.request_id].append((event.token, event.logprobs))
        left -= isinstance(event, FinishEvent)
    return [answers[request.request_id] for request in requests]


@pytest.mark.parametrize("slots", [17, 3])
def test_company_changes_no_bit(
    opened: tuple[LoadedModel, Executor],
    requests: list[GenerationRequest],
    alone: list[list[object]],
    slots: int,
) -> None:
    """With a slot for each, and with so few that the urgent ones take them from others. Twice: the second time the
    prompts start from checkpoints of the first."""
    with_engine = _engine(opened[1], max_slots=slots, prefix_cache=ByteSize(300 << 20))
    engine = next(with_engine)
    order = sorted(range(17), key=lambda number: -requests[number].priority)
    for _ in range(2):
        together = _run(engine, [requests[number] for number in order], first=3)
        for number, answer in zip(order, together, strict=True):
            assert answer == alone[number], f"request {number} of {slots} slots"
    statistics = engine.statistics()
    assert statistics.cached_tokens > 500
    assert (statistics.preemptions > 0) == (slots == 3)
    next(with_engine, None)
