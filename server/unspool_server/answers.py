"""From events to a reply, whole or streamed: what both generation routes do alike. Each brings its own format."""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from fastapi import Request, Response
from starlette.types import Receive

from unspool.requests import EngineEvent, GenerationRequest
from unspool_server.choices import Choice, Piece, joined, usage_of
from unspool_server.errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error
from unspool_server.generations import Generations, Run
from unspool_server.schemas import GenerationBody, StreamOptions
from unspool_server.streams import DONE, EventStream, encode, frame
from unspool_server.vocabulary import Vocabulary

Result = TypeVar("Result")
Body = dict[str, Any]


class ReplyFormat(ABC):
    """How a route writes its replies to one request."""

    id_prefix: ClassVar[str]

    def __init__(self, model: str, vocabulary: Vocabulary, logprobs: bool) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._vocabulary = vocabulary
        self._logprobs = logprobs

    def envelope(self, choices: list[Body], *, streamed: bool) -> Body:
        """What goes around the choices, but for the usage."""
        return {
            "id": self.id,
            "object": self.object_name(streamed=streamed),
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    @abstractmethod
    def object_name(self, *, streamed: bool) -> str:
        """OpenAI's name for a whole reply or for a chunk."""

    @abstractmethod
    def opening(self, choice: Choice) -> Body | None:
        """A chunk's choice before the first text, if the route sends one."""

    @abstractmethod
    def delta(self, choice: Choice, piece: Piece) -> Body:
        """A chunk's choice."""

    @abstractmethod
    def whole(self, choice: Choice, piece: Piece) -> Body:
        """A whole reply's choice."""


class Answer:
    """The choices of one request, in the order of its prompts, and the format that they are told in."""

    def __init__(self, choices: Sequence[Choice], reply: ReplyFormat) -> None:
        self.choices = choices
        self.reply = reply
        self._by_id: Mapping[str, Choice] = {choice.request.request_id: choice for choice in choices}

    @property
    def requests(self) -> list[GenerationRequest]:
        return [choice.request for choice in self.choices]

    async def collect(self, run: Run) -> bytes:
        """The whole reply. Raises ApiError when a generation could not be finished."""
        pieces: dict[int, list[Piece]] = {choice.index: [] for choice in self.choices}
        for choice in self.choices:
            if opening := choice.opening():
                pieces[choice.index].append(opening)
        async for events in run.batches():
            await asyncio.to_thread(self._keep, run, events, pieces)
        return await asyncio.to_thread(self._whole, pieces)

    async def stream(self, run: Run, options: StreamOptions) -> AsyncGenerator[bytes, None]:
        """The reply's frames. A failure becomes the last frame, as the reply's status is long sent."""
        for body in self._openings():
            yield self._chunk([body], options)
        async for events in run.batches():
            frames: list[bytes] = []
            failure: ApiError | None = None
            try:
                await asyncio.to_thread(self._tell, run, events, frames, options)
            except Exception as error:  # whatever it is, a stream must not just break off
                failure = as_api_error(error)
            for ready in frames:
                yield ready
            if failure is not None:
                yield frame(failure.body())
                return
        if options.include_usage:
            yield frame(self.reply.envelope([], streamed=True) | {"usage": usage_of(self.choices).body()})
        yield DONE

    def _pieces(self, run: Run, events: list[EngineEvent]) -> Iterator[tuple[Choice, Piece]]:
        for event in events:
            if not run.is_open(event.request_id):
                continue
            choice = self._by_id[event.request_id]
            piece = choice.absorb(event)
            if piece is not None:
                if piece.finish_reason is not None:
                    run.end(event.request_id)
                yield choice, piece

    def _keep(self, run: Run, events: list[EngineEvent], pieces: dict[int, list[Piece]]) -> None:
        for choice, piece in self._pieces(run, events):
            pieces[choice.index].append(piece)

    def _tell(self, run: Run, events: list[EngineEvent], frames: list[bytes], options: StreamOptions) -> None:
        for choice, piece in self._pieces(run, events):
            frames.append(self._chunk([self.reply.delta(choice, piece)], options))

    def _whole(self, pieces: dict[int, list[Piece]]) -> bytes:
        bodies = [self.reply.whole(choice, joined(pieces[choice.index])) for choice in self.choices]
        usage = {"usage": usage_of(self.choices).body()}
        return encode(self.reply.envelope(bodies, streamed=False) | usage)

    def _openings(self) -> Iterator[Body]:
        for choice in self.choices:
            if (body := self.reply.opening(choice)) is not None:
                yield body
            if (piece := choice.opening()) is not None:
                yield self.reply.delta(choice, piece)

    def _chunk(self, choices: list[Body], options: StreamOptions) -> bytes:
        body = self.reply.envelope(choices, streamed=True)
        if options.continuous_usage_stats:
            body["usage"] = usage_of(self.choices).body()
        elif options.include_usage:
            body["usage"] = None
        return frame(body)


async def respond(request: Request, body: GenerationBody, answer: Answer, generations: Generations) -> Response:
    """Has the engine generate, and replies. A client that leaves ends its generations."""
    run = await generations.start(answer.requests)
    if body.stream:
        return EventStream(answer.stream(run, body.stream_options or StreamOptions()), run.close)
    try:
        content = await _unless_disconnected(request.receive, answer.collect(run))
    finally:
        run.close()
    if content is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(content, media_type="application/json")


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The work's result, or None as soon as the client has left."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
