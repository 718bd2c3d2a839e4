"""Requests on their way through the engine: submitted as there is room, cancelled when nobody waits for them."""

import asyncio
import contextlib
import queue
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from concurrent.futures import Future

from unspool.engine import Engine
from unspool.llm.admission import Admission
from unspool.requests import EngineDead, EngineEvent, FinishEvent, GenerationRequest

Arrival = EngineEvent | None
"""None: there is room for the next request."""


class Run:
    """`deliver` is called from any thread; what it gets belongs to `take`. Close a run in every case."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        requests: Iterable[GenerationRequest],
        deliver: Callable[[Arrival], None],
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._deliver = deliver
        self._waiting = deque(requests)
        self._open: set[str] = set()
        self._place: Future[None] | None = None
        self._ask()

    @property
    def is_open(self) -> bool:
        """Whether more is to come."""
        return bool(self._waiting or self._open)

    def take(self, arrival: Arrival) -> EngineEvent | None:
        """The event that arrived, if one did; submits the next request when it was room.

        Raises InvalidRequest for what the engine refuses, and EngineDead.
        """
        if arrival is None:
            self._submit()
            return None
        if isinstance(arrival, FinishEvent):
            self._open.discard(arrival.request_id)
            if arrival.reason in ("error", "cancelled") and not self._engine.alive:
                raise EngineDead(arrival.error or "the engine was shut down before the text was complete")
        return arrival

    def close(self) -> None:
        """Cancels what is in flight."""
        if self._place is not None:
            self._admission.abandon(self._place)
        for request_id in self._open:
            self._engine.cancel(request_id)

    def _ask(self) -> None:
        if self._waiting:
            self._place = self._admission.ask()
            self._place.add_done_callback(lambda _: self._deliver(None))

    def _submit(self) -> None:
        request = self._waiting.popleft()
        self._open.add(request.request_id)
        self._engine.submit(request, self._receive)
        self._place = None
        self._ask()

    def _receive(self, event: EngineEvent) -> None:
        """The engine's thread calls this."""
        if isinstance(event, FinishEvent):
            self._admission.release()
        self._deliver(event)


def events(
    engine: Engine, admission: Admission, requests: Iterable[GenerationRequest]
) -> Generator[EngineEvent, None, None]:
    """All events of all requests. Leaving early cancels them. Raises as `Run.take` does."""
    arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
    run = Run(engine, admission, requests, arrived.put)
    try:
        while run.is_open:
            if event := run.take(arrived.get()):
                yield event
    finally:
        run.close()


async def async_events(
    engine: Engine, admission: Admission, requests: Iterable[GenerationRequest]
) -> AsyncGenerator[EngineEvent, None]:
    """The same on an event loop."""
    arrived: asyncio.Queue[Arrival] = asyncio.Queue()
    run = Run(engine, admission, requests, on_loop(arrived.put_nowait))
    try:
        while run.is_open:
            if event := run.take(await arrived.get()):
                yield event
    finally:
        run.close()


def on_loop(receive: Callable[[Arrival], None]) -> Callable[[Arrival], None]:
    """Has the running loop call `receive`, from whatever thread. A loop that is closed has nobody left to tell."""
    loop = asyncio.get_running_loop()

    def deliver(arrival: Arrival) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(receive, arrival)

    return deliver
