"""A tiny model, engines on it, and what collects their answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_model import VOCABULARY, tiny_model

from unspool import UnspoolForCausalLM
from unspool.engine import Engine, EngineOptions
from unspool.executor import Executor, NativeExecutor, TorchExecutor
from unspool.native import pack
from unspool.requests import EngineEvent, FinishEvent, GenerationRequest, PromptEvent, SamplingParams, TokenEvent

EXECUTORS: dict[str, Callable[[UnspoolForCausalLM], Executor]] = {
    "torch": TorchExecutor,
    "native": lambda model: NativeExecutor(model.config, pack(model, "float32"), torch.float32),
}


class Answer:
    """Collects one request's events."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self.events: list[EngineEvent] = []

    def __call__(self, event: EngineEvent) -> None:
        self._events.put(event)

    def next(self) -> EngineEvent:
        self.events.append(self._events.get(timeout=60))
        return self.events[-1]

    def finish(self) -> FinishEvent:
        while not isinstance(event := self.next(), FinishEvent):
            pass
        return event

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, TokenEvent)]

    @property
    def prompt(self) -> PromptEvent:
        assert isinstance(self.events[0], PromptEvent)
        return self.events[0]

    @property
    def end(self) -> FinishEvent:
        assert isinstance(self.events[-1], FinishEvent)
        return self.events[-1]


class GatedExecutor:
    """An executor that computes only as many calls as it is allowed, so that a test knows where its engine is."""

    def __init__(self, executor: Executor) -> None:
        self.config, self.shared_chunk, self.new_pool = executor.config, executor.shared_chunk, executor.new_pool
        self._executor = executor
        self._allowed = 0
        self._waits = False
        self._changed = threading.Condition()

    def allow(self, calls: int = 1 << 60) -> None:
        """Lets so many more calls through."""
        with self._changed:
            self._allowed += calls
            self._waits = False
            self._changed.notify_all()

    def wait(self) -> None:
        """Returns when the engine has used up its calls and wants another."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waits, timeout=60)

    def logits(self, *arguments: object) -> torch.Tensor:
        with self._changed:
            self._waits = self._allowed == 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._allowed > 0)
            self._allowed -= 1
        return self._executor.logits(*arguments)


@pytest.fixture
def gated() -> type[GatedExecutor]:
    return GatedExecutor


@pytest.fixture
def new_answer() -> type[Answer]:
    return Answer


@pytest.fixture(scope="session")
def request_of() -> Callable[..., GenerationRequest]:
    """A greedy request for twelve tokens after a random prompt of that length, which the length alone determines."""

    def make(name: str, length: int, **fields: object) -> GenerationRequest:
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        values = {"prompt": tuple(prompt), "max_tokens": 12, "sampling": SamplingParams(temperature=0.0)} | fields
        return GenerationRequest(request_id=name, **values)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Answer]]:
    """Submits requests together and waits for all of them."""

    def submit(engine: Engine, *requests: GenerationRequest) -> list[Answer]:
        answers = [Answer() for _ in requests]
        for one, answer in zip(requests, answers, strict=True):
            engine.submit(one, answer)
        for answer in answers:
            answer.finish()
        return answers

    return submit


@pytest.fixture(scope="session")
def model() -> UnspoolForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session", params=list(EXECUTORS))
def executor(request: pytest.FixtureRequest, model: UnspoolForCausalLM) -> Executor:
    return EXECUTORS[request.param](model)


@pytest.fixture(scope="session")
def native(model: UnspoolForCausalLM) -> Executor:
    return EXECUTORS["native"](model)


@pytest.fixture
def start_engine() -> Iterator[Callable[..., Engine]]:
    """Starts engines with options, and ends them after the test."""
    engines: list[Engine] = []

    def start(executor: Executor, **options: object) -> Engine:
        engine = Engine(executor, EngineOptions(**options))  # type: ignore[arg-type]
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.shutdown()


@pytest.fixture
def engine(executor: Executor, start_engine: Callable[..., Engine]) -> Engine:
    """One that remembers nothing from request to request."""
    return start_engine(executor, max_slots=3, prefill_chunk=7, prefix_cache=0)
