"""The bridge to the engine: requests go in by its messages, its events come out as batches on the event loop."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from unspool.requests import (
    EngineBusy,
    EngineDead,
    EngineEvent,
    EventSink,
    FinishEvent,
    GenerationRequest,
    InvalidRequest,
)


class GenerationEngine(Protocol):
    """What the server needs of an engine. All of it may be called from any thread."""

    @property
    def alive(self) -> bool: ...

    def submit(self, request: GenerationRequest, sink: EventSink) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def shutdown(self) -> None: ...


class Run:
    """The generations of one HTTP request. Close it in every case: that frees what they hold in the engine."""

    def __init__(self, engine: GenerationEngine) -> None:
        self._engine = engine
        self._open: set[str] = set()
        self._closed = False
        self._changing = threading.Lock()
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()

    async def batches(self) -> AsyncIterator[list[EngineEvent]]:
        """All events that have arrived, again and again, until every generation has finished or been ended."""
        while self._open:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            yield batch

    def is_open(self, request_id: str) -> bool:
        return request_id in self._open

    def end(self, request_id: str) -> None:
        """Says that no more is wanted of a generation, finished or not."""
        with self._changing:
            was_open = request_id in self._open
            self._open.discard(request_id)
        if was_open:
            self._engine.cancel(request_id)

    def close(self) -> None:
        """Ends all generations, and those that another thread is just submitting."""
        with self._changing:
            self._closed = True
            still_open = list(self._open)
        for request_id in still_open:
            self.end(request_id)

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, request: GenerationRequest, sink: EventSink) -> None:
        self._engine.submit(request, sink)
        with self._changing:
            self._open.add(request.request_id)
            closed = self._closed
        if closed:
            self.end(request.request_id)

    def receive(self, event: EngineEvent) -> None:
        self._events.put_nowait(event)


class Generations:
    """Starts runs and counts what is in flight: what the engine has accepted and not finished.

    `max_slots` and `max_queue` are how many generations the engine runs, and how many it lets wait.
    """

    def __init__(self, engine: GenerationEngine, max_slots: int, max_queue: int) -> None:
        self._engine = engine
        self._max_slots = max_slots
        self._max_queue = max_queue
        self.num_in_flight = 0
        self._counting = threading.Lock()

    def check_room(self, count: int) -> None:
        """Refuses early, before a prompt is tokenised, what the engine would refuse.

        Raises EngineBusy, EngineDead when the engine has stopped, and InvalidRequest when there can never be room.
        """
        if count > self._max_queue:
            raise InvalidRequest("prompt", f"at most {self._max_queue} prompts fit the queue")
        if not self._engine.alive:
            raise EngineDead("the engine has stopped")
        if self.num_in_flight + count > self._max_slots + self._max_queue:
            raise EngineBusy(f"{self.num_in_flight} generations are in flight")

    async def start(self, requests: Sequence[GenerationRequest]) -> Run:
        """Submits all requests or none. Raises what the engine's `submit` raises."""
        run = Run(self._engine)
        sink = self._sink(run, asyncio.get_running_loop())
        try:
            # The engine checks every token of a prompt as it takes it.
            await asyncio.to_thread(self._submit, run, requests, sink)
        except BaseException:
            run.close()
            raise
        return run

    def _submit(self, run: Run, requests: Sequence[GenerationRequest], sink: EventSink) -> None:
        """Stops where the run is closed: whoever started it may have gone while this thread went on."""
        for request in requests:
            if run.closed:
                return
            self._count(1)
            try:
                run.submit(request, sink)
            except BaseException:
                self._count(-1)
                raise

    def _count(self, change: int) -> None:
        with self._counting:
            self.num_in_flight += change

    def _sink(self, run: Run, loop: asyncio.AbstractEventLoop) -> EventSink:
        def deliver(event: EngineEvent) -> None:
            if isinstance(event, FinishEvent):
                self._count(-1)
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(run.receive, event)

        return deliver
