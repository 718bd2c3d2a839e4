"""Runs one turn of a session as a transaction: restore, read, generate, commit."""

import concurrent.futures
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from unspool.engine import Engine
from unspool.requests import (
    EngineDead,
    EngineEvent,
    FinishEvent,
    GenerationRequest,
    InvalidRequest,
    PromptEvent,
    TokenEvent,
)
from unspool.sessions.errors import SessionBusy, SessionConflict, TurnFailed
from unspool.sessions.head import LogPlace, SessionHead, TakenState
from unspool.sessions.log_digest import LogDigest
from unspool.sessions.options import SessionOptions
from unspool.sessions.records import SessionRecords
from unspool.sessions.results import StateSource, TurnRequest, TurnResult
from unspool.sessions.state_memory import StateKey
from unspool.sessions.state_tiers import FoundState, StateTiers
from unspool.sessions.turn import Turn
from unspool.sessions.turn_log import TurnLog, turn_key
from unspool.state import SlotSnapshot
from unspool.store import Store
from unspool.token_bytes import TOKEN_BYTES, pack_tokens, unpack_tokens

logger = logging.getLogger(__name__)

MAX_IDEMPOTENCY_KEY = 255
COMMITTING_THREADS = 4

TurnSink = Callable[[PromptEvent | TokenEvent], None]
"""Gets a turn's events on the engine's thread; must return at once and must not raise."""


@dataclass(frozen=True)
class _Start:
    """What a turn goes on from."""

    head: SessionHead
    found: FoundState | None
    unread: bytes
    """Tokens of the log that the state has not consumed."""
    before: LogDigest
    """Of the whole log."""
    seconds: float

    @property
    def source(self) -> StateSource:
        if self.found is not None:
            return self.found.tier
        return "replay" if self.head.place.position else "empty"


class RunningTurn:
    """A turn under way. `result` tells what it came to."""

    def __init__(self, engine: Engine, turn: str) -> None:
        self.id = turn
        self.future: Future[TurnResult] = Future()
        self.future.set_running_or_notify_cancel()  # so that who waits for it cannot cancel it, but only the turn
        self._engine = engine

    def cancel(self) -> None:
        """Ends the turn; the session stays as it was. Too late once it is being committed."""
        self._engine.cancel(self.id)

    def result(self, timeout: float | None = None) -> TurnResult:
        """Waits. Raises TurnFailed, SessionConflict, and what the store raises when it could not take the turn."""
        return self.future.result(timeout)


class TurnRunner:
    """Begins turns, one at a time for each session, and commits them on threads of its own."""

    def __init__(
        self, engine: Engine, store: Store, records: SessionRecords, tiers: StateTiers, options: SessionOptions
    ) -> None:
        self._engine = engine
        self._store = store
        self._records = records
        self._tiers = tiers
        self._options = options
        self._log = TurnLog(store)
        self._holder = uuid.uuid4().hex
        self._busy: dict[tuple[str, str], RunningTurn | None] = {}
        """Sessions that have a writer, with the turn if it is one."""
        self._closed = False
        self._changing = threading.Lock()
        self._committing = ThreadPoolExecutor(COMMITTING_THREADS, thread_name_prefix="unspool-commit")

    def begin(self, owner: str, session: str, request: TurnRequest, sink: TurnSink) -> RunningTurn:
        """Restores the state and queues the turn. Raises InvalidRequest, SessionNotFound, SessionBusy,
        SessionConflict, EngineBusy, EngineDead, and what the store raises; then nothing was begun."""
        self._check(request)
        turn = RunningTurn(self._engine, f"turn_{uuid.uuid4().hex}")
        self.enter(owner, session)
        try:
            head = self._records.read(owner, session)
            if (committed := head.results.get(request.idempotency_key or "")) is not None:
                turn.future.set_result(self._repeated(committed.turn, committed.generation))
                self.leave(owner, session)
                return turn
            if request.expected_generation not in (None, head.generation):
                raise SessionConflict(request.expected_generation or 0, head.generation)
            start = self._restore(head)
            with self._changing:
                if self._closed:
                    raise EngineDead("the sessions are closed")
                self._busy[owner, session] = turn
            self._submit(turn, start, request, sink)
        except BaseException as error:
            self.leave(owner, session)
            if not turn.future.done():
                turn.future.set_exception(error)  # `close` may be waiting for it
            raise
        if self._closed:  # `close` came before the engine knew the turn
            turn.cancel()
        return turn

    def enter(self, owner: str, session: str) -> None:
        """Makes the caller the session's one writer. Raises SessionBusy."""
        busy = SessionBusy("a turn of this session is under way; try again when it has ended")
        with self._changing:
            if self._closed:
                raise EngineDead("the sessions are closed")
            if (owner, session) in self._busy:
                raise busy
            self._busy[owner, session] = None
        if self._options.lease_seconds:
            try:
                lease = self._store.lease(_lease_key(owner, session), self._holder, self._options.lease_seconds)
            except BaseException:
                self._release(owner, session)
                raise
            if lease is None:
                self._release(owner, session)
                raise busy

    def leave(self, owner: str, session: str) -> None:
        """Ends what `enter` began. If the store is away, the lease ends by itself."""
        try:
            if self._options.lease_seconds:
                self._store.release(_lease_key(owner, session), self._holder)
        except Exception as error:
            logger.warning("the lease of session %s was not given back: %s", session, error)
        finally:
            self._release(owner, session)

    def close(self) -> None:
        """Cancels the turns under way, and returns when those that had ended are committed."""
        with self._changing:
            self._closed = True
            running = [turn for turn in self._busy.values() if turn is not None]
        for turn in running:
            turn.cancel()
        concurrent.futures.wait([turn.future for turn in running])
        self._committing.shutdown()

    def _release(self, owner: str, session: str) -> None:
        with self._changing:
            self._busy.pop((owner, session), None)

    def _check(self, request: TurnRequest) -> None:
        vocabulary = self._engine.vocab_size
        if not all(0 <= token < vocabulary for token in request.tokens):
            raise InvalidRequest("tokens", f"token ids must be between 0 and {vocabulary - 1}")
        if request.max_tokens < 0:
            raise InvalidRequest("max_tokens", "must not be negative")
        if len(request.tokens) + request.max_tokens > self._options.max_turn_tokens:
            raise InvalidRequest("tokens", f"with max_tokens a turn adds at most {self._options.max_turn_tokens}")
        if not request.tokens and not request.max_tokens:
            raise InvalidRequest("tokens", "must hold at least one token when none is to be generated")
        key = request.idempotency_key
        if key is not None and not (1 <= len(key) <= MAX_IDEMPOTENCY_KEY and key.isascii() and key.isprintable()):
            raise InvalidRequest("idempotency_key", f"must be 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters")

    def _restore(self, head: SessionHead) -> _Start:
        """The nearest state at hand, and the tokens since."""
        started = time.perf_counter()
        found = None
        for taken in reversed(head.states):
            if found := self._tiers.find(StateKey(head.owner, taken.digest), taken.position):
                break
        unread = self._log.tokens(head.place, found.state.position if found else 0)
        before = self._log.digest(head.place)
        return _Start(head, found, unread, before, time.perf_counter() - started)

    def _submit(self, turn: RunningTurn, start: _Start, request: TurnRequest, sink: TurnSink) -> None:
        """Hands the turn to the engine. The log's last token is left for the next turn to read, as nothing follows it
        yet: so a turn may begin with no tokens of its own."""
        prompt = (*unpack_tokens(start.unread), *request.tokens)
        if not prompt:
            raise InvalidRequest("tokens", "must hold at least one token, as the session has none")
        if not request.max_tokens:
            prompt = prompt[:-1]
        generated: list[int] = []

        def receive(event: EngineEvent) -> None:
            if isinstance(event, FinishEvent):
                self._committing.submit(self._finish, turn, start, request, tuple(generated), event)
                return
            if isinstance(event, TokenEvent):
                generated.append(event.token)
            sink(event)

        if not prompt:
            receive(FinishEvent(turn.id, "length", 0, 0))
            return
        self._engine.submit(
            GenerationRequest(
                request_id=turn.id,
                prompt=prompt,
                start=start.found.state if start.found else None,
                keep_state=True,
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                stop_ids=request.stop_ids,
                stop=request.stop,
                continues_text=request.continues_text,
                skip_special_tokens=request.skip_special_tokens,
                constraint=request.constraint,
                logprobs=request.logprobs,
                owner=start.head.owner,
                priority=request.priority,
                deadline=request.deadline,
            ),
            receive,
        )

    def _finish(
        self, turn: RunningTurn, start: _Start, request: TurnRequest, generated: tuple[int, ...], event: FinishEvent
    ) -> None:
        """Commits a turn that ended well, and tells its caller in every case."""
        try:
            if event.reason not in ("stop", "length"):
                raise TurnFailed(event.reason, event.error or f"the turn was {event.reason}; nothing of it was kept")
            result = self._commit(turn.id, start, request, generated, event)
        except BaseException as error:  # whoever waits must learn of it
            self.leave(start.head.owner, start.head.id)
            turn.future.set_exception(error)
            return
        self.leave(start.head.owner, start.head.id)
        turn.future.set_result(result)

    def _commit(
        self, turn_id: str, start: _Start, request: TurnRequest, generated: tuple[int, ...], event: FinishEvent
    ) -> TurnResult:
        place = start.head.place
        added = pack_tokens((*request.tokens, *generated))
        turn = Turn(
            id=turn_id,
            parent=place.turn,
            number=place.number + 1,
            start=place.position,
            tokens=added,
            given=len(request.tokens),
            before=start.before,
            made_by=start.head.key,
            finish_reason=event.reason,
        )
        taken = self._take(start, turn, event.state)

        def change(head: SessionHead) -> SessionHead:
            if head.generation != start.head.generation:
                raise SessionConflict(start.head.generation, head.generation)
            moved = LogPlace(turn.id, turn.end, turn.number)
            return head.went_on(moved, taken, request.idempotency_key)

        head = self._records.change(start.head.owner, start.head.id, change, {turn_key(turn.id): turn.encode()})
        left = head.no_longer_wanted(start.head)
        self._tiers.forget([StateKey(head.owner, state.digest) for state in left])
        return TurnResult(
            generation=head.generation,
            position=head.place.position,
            turn=turn.number,
            tokens=generated,
            finish_reason=event.reason,
            stopped_by=event.stopped_by,
            state_source=start.source,
            replayed_tokens=len(start.unread) // TOKEN_BYTES,
            restore_seconds=start.seconds,
        )

    def _take(self, start: _Start, turn: Turn, state: SlotSnapshot | None) -> TakenState | None:
        """Hands the turn's state to the tiers. Before the commit: a state that no head names is only never found."""
        if state is None:
            return None
        digest = turn.digest_at(state.position).hex()
        parent = start.found.key if start.found else None
        self._tiers.keep(StateKey(start.head.owner, digest), state, parent, line=f"{start.head.owner}/{start.head.id}")
        return TakenState(state.position, digest, turn.number)

    def _repeated(self, turn: str, generation: int) -> TurnResult:
        record = self._log.read(turn)
        return TurnResult(
            generation=generation,
            position=record.end,
            turn=record.number,
            tokens=unpack_tokens(record.tokens)[record.given :],
            finish_reason=record.finish_reason,
            is_repeated=True,
        )


def _lease_key(owner: str, session: str) -> str:
    return f"leases/{owner}/{session}"
