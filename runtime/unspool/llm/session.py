"""A session as a notebook sees it: texts and messages in, outputs out, and the places that one can go back to."""

import asyncio
import contextlib
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass

from unspool.llm.admission import Admission
from unspool.llm.chat_turns import ChatTurns, Messages, as_messages, encode
from unspool.llm.generation import Preparer, Prompt
from unspool.llm.outputs import TurnOutput
from unspool.llm.params import SamplingParams
from unspool.llm.run import Arrival, on_loop
from unspool.llm.turn import Turn, TurnPiece, check_turn
from unspool.requests import InvalidRequest
from unspool.sessions import Place, Rollback, RunningTurn, SessionInfo, Sessions, TurnRequest
from unspool.text import CONTEXT_TOKENS, encode_prompt
from unspool.token_bytes import unpack_tokens


@dataclass(frozen=True)
class SessionHost:
    """What the sessions of one model have in common."""

    sessions: Sessions
    preparer: Preparer
    chat: ChatTurns
    admission: Admission
    owner: str
    default_params: SamplingParams


class Session:
    """A conversation, or any text that grows at its end, whose state is kept: what was said is never read again.

        session = llm.session("novel")
        session.say("Who are you?", SamplingParams(max_tokens=100)).text
        other = session.fork()
        session.rollback(turn=-1)

    One turn runs at a time; it is committed whole or, when it fails or is cancelled, not at all. What an answer was
    stays in the log as it was generated, even where the model's template would leave out parts of it later on.

    Methods raise InvalidRequest, SessionError (SessionNotFound, SessionBusy, SessionConflict, TurnFailed, ...),
    EngineDead, and what the store raises: StoreUnavailable, StoreFull, StoreCorrupt.
    """

    def __init__(self, host: SessionHost, session_id: str) -> None:
        self.id = session_id
        self._host = host

    @property
    def info(self) -> SessionInfo:
        """Where it is now, and its snapshots."""
        return self._host.sessions.info(self._host.owner, self.id)

    @property
    def token_ids(self) -> list[int]:
        """The whole log."""
        return list(self._tokens(0))

    @property
    def text(self) -> str:
        """The whole log with its special tokens."""
        text = self._host.preparer.tokenizer.decode(self.token_ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def say(self, messages: str | Messages, params: SamplingParams | None = None) -> TurnOutput:
        """Adds messages, by the model's chat template, and its answer. A text is one message of the user's.

        Raises UserError when the model has no chat template. InvalidRequest says so when the template cannot go on
        from a log, and when the log is not at an answer: after `append`, use `generate`.
        """
        return _last(self._run(self._chat_turn(messages, params)))

    def generate(self, params: SamplingParams | None = None) -> TurnOutput:
        """Goes on where the log ends."""
        return _last(self._run(self._plain_turn(params)))

    def append(self, prompt: Prompt) -> TurnOutput:
        """Adds a text, tokenised by itself, or tokens."""
        tokens = self._encode(prompt)
        return _last(self._run(self._turn(TurnRequest(tokens=tokens, max_tokens=0), SamplingParams(max_tokens=0))))

    async def stream(
        self, messages: str | Messages | None = None, params: SamplingParams | None = None
    ) -> AsyncGenerator[TurnPiece, None]:
        """`say`, or `generate` when there are no messages, piece by piece. Leaving early, or cancelling the task, takes
        the turn back."""
        turn = await asyncio.to_thread(self._asked_turn, messages, params)
        arrived: asyncio.Queue[Arrival] = asyncio.Queue()
        deliver = on_loop(arrived.put_nowait)
        running = await self._begin_async(turn, deliver)
        try:
            while (event := await arrived.get()) is not None:
                if delta := turn.take(event):
                    yield TurnPiece(delta)
            yield turn.end(running.result())
        finally:
            running.cancel()
            if not running.future.done():
                await asyncio.to_thread(wait, [running.future])

    def stream_sync(
        self, messages: str | Messages | None = None, params: SamplingParams | None = None
    ) -> Generator[TurnPiece, None, None]:
        """The same without an event loop."""
        return self._run(self._asked_turn(messages, params))

    def fork(self, at: Place | None = None, id: str | None = None) -> "Session":
        """A session of its own with the same log up to a place, by default its end. Nothing is copied."""
        return Session(self._host, self._host.sessions.fork(self._host.owner, self.id, at, id).id)

    def rollback(
        self, *, turn: int | None = None, position: int | None = None, snapshot: str | None = None
    ) -> Rollback:
        """Takes back what came after so many turns (negative: counted from the end), tokens, or a snapshot."""
        return self._host.sessions.rollback(self._host.owner, self.id, Place(turn, position, snapshot))

    def snapshot(self, name: str, at: Place | None = None) -> SessionInfo:
        """Gives a place of the log, by default its end, a name to go back to."""
        return self._host.sessions.snapshot(self._host.owner, self.id, name, at)

    def delete_snapshot(self, name: str) -> SessionInfo:
        return self._host.sessions.delete_snapshot(self._host.owner, self.id, name)

    def delete(self) -> None:
        """Forks keep what they share."""
        self._host.sessions.delete(self._host.owner, self.id)

    def _asked_turn(self, messages: str | Messages | None, params: SamplingParams | None) -> Turn:
        return self._plain_turn(params) if messages is None else self._chat_turn(messages, params)

    def _chat_turn(self, said: str | Messages, params: SamplingParams | None) -> Turn:
        params, messages, chat = params or self._host.default_params, as_messages(said), self._host.chat
        info = self.info
        if info.position == 0:
            tokens = chat.opening(messages)
        else:
            if not chat.opens_answer(self._last_given()):
                raise InvalidRequest(
                    "messages",
                    "the session's log does not end in an answer, which messages could follow; use append and "
                    "generate, or go back to a turn that say made",
                )
            tokens = chat.continuation(messages, self._tokens(info.position - 1)[0])
        return self._turn(self._request(params, tuple(tokens), info.generation), params)

    def _plain_turn(self, params: SamplingParams | None) -> Turn:
        params, info = params or self._host.default_params, self.info
        context = self._tokens(max(info.position - CONTEXT_TOKENS, 0))
        return self._turn(self._request(params, (), info.generation), params, context)

    def _turn(self, request: TurnRequest, params: SamplingParams, context: Sequence[int] = ()) -> Turn:
        return Turn(request, self._host.preparer.sample(params, context=context))

    def _request(self, params: SamplingParams, tokens: tuple[int, ...], generation: int) -> TurnRequest:
        check_turn(params)
        return TurnRequest(
            tokens=tokens,
            max_tokens=params.max_tokens,
            sampling=params.token_sampling(),
            stop_ids=params.stop_ids(self._host.preparer.eos_ids),
            stop=params.stop_strings,
            continues_text=not tokens,
            skip_special_tokens=params.skip_special_tokens,
            constraint=self._host.preparer.constraint(params.structured_outputs),
            logprobs=params.logprobs,
            priority=params.priority,
            deadline=params.deadline,
            # What the tokens are depends on where the log ends.
            expected_generation=generation,
        )

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Only a log's beginning gets the special tokens that the tokenizer adds to a text."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        tokenizer = self._host.preparer.tokenizer
        is_first = self.info.position == 0
        return tuple(encode_prompt(tokenizer, prompt) if is_first else encode(tokenizer, prompt, "prompt"))

    def _tokens(self, start: int) -> tuple[int, ...]:
        return unpack_tokens(self._host.sessions.tokens(self._host.owner, self.id, start))

    def _last_given(self) -> tuple[int, ...]:
        """The tokens of the log that were given to it last."""
        host = self._host
        place = host.sessions.records.read(host.owner, self.id).place
        for turn, end in host.sessions.log.back_from(place):
            if turn.given:
                return unpack_tokens(turn.tokens)[: min(turn.given, end - turn.start)]
        return ()

    def _run(self, turn: Turn) -> Generator[TurnPiece, None, None]:
        admitted = self._host.admission.ask()
        try:
            admitted.result()
        except BaseException:
            self._host.admission.abandon(admitted)
            raise
        arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        running = self._begin(turn, arrived.put)
        try:
            while (event := arrived.get()) is not None:
                if delta := turn.take(event):
                    yield TurnPiece(delta)
            yield turn.end(running.result())
        finally:
            running.cancel()
            wait([running.future])

    async def _begin_async(self, turn: Turn, deliver: Callable[[Arrival], None]) -> RunningTurn:
        admitted = self._host.admission.ask()
        try:
            await asyncio.wrap_future(admitted)
        except BaseException:
            self._host.admission.abandon(admitted)
            raise
        # It reads the store. A thread cannot be cancelled: whatever it begins after all is taken back.
        begun = asyncio.get_running_loop().run_in_executor(None, self._begin, turn, deliver)
        try:
            return await asyncio.shield(begun)
        except asyncio.CancelledError:
            begun.add_done_callback(_take_back)
            raise

    def _begin(self, turn: Turn, deliver: Callable[[Arrival], None]) -> RunningTurn:
        """Begins a turn that has been admitted; None is delivered when it has ended."""
        release = self._host.admission.release
        try:
            running = self._host.sessions.begin(self._host.owner, self.id, turn.request, deliver)
        except BaseException:
            release()
            raise
        running.future.add_done_callback(lambda _: release())
        running.future.add_done_callback(lambda _: deliver(None))
        return running


def _last(pieces: Generator[TurnPiece, None, None]) -> TurnOutput:
    output = None
    with contextlib.closing(pieces):
        for piece in pieces:
            output = piece.turn
    assert output is not None
    return output


def _take_back(begun: "asyncio.Future[RunningTurn]") -> None:
    """For a turn that nobody waits for any more; if it did not begin, nobody needs to know why."""
    if not begun.cancelled() and begun.exception() is None:
        begun.result().cancel()
