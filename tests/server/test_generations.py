"""The bridge to the engine: what is started is ended, and streams go on whatever else the server is busy with."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from unspool.requests import EngineBusy, EventSink, FinishEvent, GenerationRequest, InvalidRequest, TokenEvent
from unspool_server.generations import Generations
from unspool_server.service import Backend, ServedModel
from unspool_server.settings import ServerSettings

if TYPE_CHECKING:
    from conftest import RunningApp

REQUESTS = [GenerationRequest(request_id=str(index), prompt=(1,)) for index in range(3)]


class HeldEngine:
    """An engine whose requests finish only when they are cancelled, and that takes none before it is let."""

    def __init__(self) -> None:
        self.alive = True
        self.asked = threading.Event()
        self.let = threading.Event()
        self.refuses: set[str] = set()
        self.sinks: dict[str, EventSink] = {}
        self.num_submitted = 0

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        self.asked.set()
        assert self.let.wait(10)
        if request.request_id in self.refuses:
            raise EngineBusy("full")
        self.num_submitted += 1
        self.sinks[request.request_id] = sink

    def cancel(self, request_id: str) -> None:
        if sink := self.sinks.pop(request_id, None):
            sink(FinishEvent(request_id, "cancelled", 1, 0))

    def shutdown(self) -> None:
        for request_id in list(self.sinks):
            self.cancel(request_id)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_start_that_is_cancelled_leaves_nothing_in_flight() -> None:
    engine = HeldEngine()
    generations = Generations(engine, max_slots=1, max_queue=2)

    async def start_and_leave() -> None:
        task = asyncio.create_task(generations.start(REQUESTS))
        await wait_for(engine.asked.is_set)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        engine.let.set()

    asyncio.run(start_and_leave())  # ends when the submitting thread has
    assert engine.num_submitted == 1 and not engine.sinks
    generations.check_room(2)
    assert generations.num_in_flight == 0


def test_start_that_is_refused_half_way_ends_the_first_half() -> None:
    engine = HeldEngine()
    engine.let.set()
    engine.refuses = {"2"}
    generations = Generations(engine, max_slots=1, max_queue=2)
    with pytest.raises(EngineBusy):
        asyncio.run(generations.start(REQUESTS))
    assert engine.num_submitted == 2 and not engine.sinks and generations.num_in_flight == 0


def test_stream_goes_on_while_prompts_are_being_read(
    run_app: Callable[[ServerSettings], RunningApp],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, read = HeldEngine(), threading.Event()
    engine.let.set()
    app = run_app(ServerSettings())
    app.service.open(Backend(ServedModel("tiny", tokenizer, frozenset()), engine, max_slots=50, max_queue=50))
    body = {"model": "tiny", "prompt": "hello"}

    def read_slowly(*_: object) -> None:
        read.wait(30)
        raise InvalidRequest("prompt", "too long")

    def ask(_: int) -> int:
        return httpx.post(f"{app.url}/v1/completions", json=body, timeout=40).status_code

    with (
        ThreadPoolExecutor(40) as others,
        httpx.stream("POST", f"{app.url}/v1/completions", json={**body, "stream": True}, timeout=10) as reply,
    ):
        monkeypatch.setattr("unspool_server.completions.prepare_completion", read_slowly)
        waiting = [others.submit(ask, index) for index in range(40)]  # more than the loop has threads of its own
        time.sleep(1)
        [(request_id, sink)] = engine.sinks.items()
        pieces = reply.iter_text()
        try:
            for token in tokenizer.encode("the quick brown fox"):
                sink(TokenEvent(request_id, token, None))
                assert "data: " in next(pieces)
            assert not any(future.done() for future in waiting)
        finally:
            read.set()
            engine.shutdown()
        assert {future.result() for future in waiting} == {400}
