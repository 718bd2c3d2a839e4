"""The sessions of an engine: made, continued, forked, taken back, and found again after a crash."""

import itertools
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace

from unspool.engine import Engine
from unspool.requests import InvalidRequest
from unspool.sessions.errors import SessionConflict, SessionError, SessionNotFound
from unspool.sessions.head import (
    MAX_SNAPSHOTS,
    STATES_OF_A_SNAPSHOT,
    LogPlace,
    NamedPlace,
    SessionHead,
    TakenState,
    check_name,
)
from unspool.sessions.options import SessionOptions
from unspool.sessions.records import SessionRecords
from unspool.sessions.results import Place, Rollback, SessionInfo, TurnRequest, TurnResult
from unspool.sessions.state_memory import StateKey
from unspool.sessions.state_tiers import StateTiers, TierStatistics
from unspool.sessions.transfer import Importer, export_session, newest_state
from unspool.sessions.turn_log import TurnLog, turn_key
from unspool.sessions.turn_runner import RunningTurn, TurnRunner, TurnSink
from unspool.store import ExpectedState, StateIdentity, Store, StoreCorrupt, StoreFull, StoreUnavailable

logger = logging.getLogger(__name__)

MAX_LISTED = 1000


class Sessions:
    """Sessions in a store, run on an engine. Thread-safe; every method names the owner, and other owners' sessions are
    as if they were not there.

    Every method raises InvalidRequest for a malformed name, SessionNotFound, and what the store raises:
    StoreUnavailable, StoreFull, StoreCorrupt. Whatever is raised, the session is as it was; only after StoreUnavailable
    it may have changed, which reading it tells, or an idempotency key.
    """

    def __init__(
        self, engine: Engine, store: Store, identity: StateIdentity, options: SessionOptions | None = None
    ) -> None:
        """`identity` is the engine's model's. The store stays the caller's; close it after this."""
        self.options = options or SessionOptions()
        self.store = store
        self.identity = identity
        self.engine = engine
        self.log = TurnLog(store)
        self.tiers = StateTiers(store, identity, engine.state_specs, self.options.state_memory)
        self.records = SessionRecords(store, identity.tokenizer, self.tiers.make_room)
        self._runner = TurnRunner(engine, store, self.records, self.tiers, self.options)
        self._importer = Importer(store, self.records, self.tiers, self.options)

    def create(self, owner: str, session: str | None = None) -> SessionInfo:
        """An empty session, of that id or a new one. Raises SessionExists."""
        head = SessionHead(id=session or new_session_id(), owner=owner, tokenizer=self.identity.tokenizer)
        self.records.create(head)
        return SessionInfo.of(head)

    def info(self, owner: str, session: str) -> SessionInfo:
        return SessionInfo.of(self.records.read(owner, session))

    def list(self, owner: str, *, after: str = "", limit: int = 100) -> list[SessionInfo]:
        """An owner's sessions by id, at most `limit` of those after the id `after`."""
        if not 1 <= limit <= MAX_LISTED:
            raise InvalidRequest("limit", f"must be between 1 and {MAX_LISTED}")
        return [SessionInfo.of(head) for head in itertools.islice(self.records.list(owner, after), limit)]

    def tokens(self, owner: str, session: str, start: int = 0) -> bytes:
        """The log's tokens from `start` on, four bytes each, little-endian."""
        return self.log.tokens(self.records.read(owner, session).place, start)

    def begin(self, owner: str, session: str, request: TurnRequest, sink: TurnSink) -> RunningTurn:
        """Begins a turn: adds tokens, then generates; commits by itself when that has ended well.

        Raises SessionBusy while another turn runs, SessionConflict when the session is at another generation, and
        EngineBusy and EngineDead.
        """
        return self._runner.begin(owner, session, request, sink)

    def append(self, owner: str, session: str, tokens: tuple[int, ...], **fields: object) -> TurnResult:
        """Adds tokens and waits until they are committed; further fields are `TurnRequest`'s."""
        request = replace(TurnRequest(tokens=tokens, max_tokens=0), **fields)  # type: ignore[arg-type]
        return self.begin(owner, session, request, _ignore).result()

    def generate(self, owner: str, session: str, request: TurnRequest) -> TurnResult:
        """A whole turn; waits until it is committed."""
        return self.begin(owner, session, request, _ignore).result()

    def fork(self, owner: str, session: str, at: Place | None = None, new: str | None = None) -> SessionInfo:
        """A session of its own that has the same log up to a place, by default its end. Nothing is copied.

        A turn under way in the first one is no part of it. Raises SessionExists.
        """
        place = LogPlace()
        states: tuple[TakenState, ...] = ()

        def share(head: SessionHead) -> SessionHead:
            nonlocal place, states
            place, states = self._resolve(head, at)
            return head.forked_at(place.position)

        origin = self.records.change(owner, session, share)
        fork = replace(
            SessionHead(id=new or new_session_id(), owner=owner, tokenizer=origin.tokenizer),
            place=place,
            states=states,
            forked_from=origin.id,
            origin=origin.key,
            inherited_until=place.position,
        )
        self.records.create(fork)
        return SessionInfo.of(fork)

    def rollback(self, owner: str, session: str, to: Place, *, expected_generation: int | None = None) -> Rollback:
        """Takes back what came after a place. Raises SessionBusy, SessionConflict, and SessionNotFound when the log
        never was there."""

        before: SessionHead | None = None

        def move(head: SessionHead) -> SessionHead:
            nonlocal before
            before = head
            if expected_generation not in (None, head.generation):
                raise SessionConflict(expected_generation or 0, head.generation)
            return head.went_back(*self._resolve(head, to))

        self._runner.enter(owner, session)
        try:
            head = self.records.change(owner, session, move)
        finally:
            self._runner.leave(owner, session)
        assert before is not None
        self._forget(head, head.no_longer_wanted(before))
        nearest = head.states[-1].position if head.states else 0
        return Rollback(
            generation=head.generation, position=head.place.position, replay_tokens=head.place.position - nearest
        )

    def snapshot(self, owner: str, session: str, name: str, at: Place | None = None) -> SessionInfo:
        """Gives a place of the log a name, by default its end; one that has the name already loses it."""
        check_name("snapshot", name)

        def add(head: SessionHead) -> SessionHead:
            snapshots = head.snapshots | {name: self._named(head, at)}
            if len(snapshots) > MAX_SNAPSHOTS:
                raise InvalidRequest("snapshot", f"a session has at most {MAX_SNAPSHOTS}; delete one")
            return replace(head, snapshots=snapshots)

        return SessionInfo.of(self.records.change(owner, session, add))

    def _named(self, head: SessionHead, at: Place | None) -> NamedPlace:
        place, states = self._resolve(head, at)
        return NamedPlace(place, states[-STATES_OF_A_SNAPSHOT:], time.time())

    def delete_snapshot(self, owner: str, session: str, name: str) -> SessionInfo:
        def drop(head: SessionHead) -> SessionHead:
            if name not in head.snapshots:
                raise SessionNotFound("the session has no snapshot of that name")
            return replace(head, snapshots={kept: place for kept, place in head.snapshots.items() if kept != name})

        return SessionInfo.of(self.records.change(owner, session, drop))

    def export(self, owner: str, session: str) -> bytes:
        """A file of the session, with the newest state at hand, signed when there is a key. Names of snapshots and what
        they alone reach are no part of it. A turn under way is none either."""
        head = self.records.read(owner, session)
        found = newest_state(self.tiers, head)
        state = found.state if found is not None else None
        return export_session(self.log, head, self.identity, state, self.options.signing_key)

    def import_session(self, owner: str, data: bytes, new_id: str | None = None) -> SessionInfo:
        """A new session of what `export` gave, here or on another server of this model. Raises ImportRejected, and
        SessionExists."""
        states = ExpectedState(identity=self.identity, layers=self.engine.state_specs)
        return self._importer.take_in(owner, new_id or new_session_id(), data, states, self.engine.vocab_size)

    def delete(self, owner: str, session: str) -> None:
        """Deletes a session, and of its log and states what no fork has. Raises SessionBusy."""
        self._runner.enter(owner, session)
        try:
            head = self.records.delete(owner, session)
        finally:
            self._runner.leave(owner, session)
        self._tidy_up(head)

    def _tidy_up(self, head: SessionHead) -> None:
        """Deletes what a session leaves that is gone; whatever fails is left to `collect`."""
        try:
            self._forget(head, [state for state in head.wanted_states if not head.shares(state)])
            for turn, _ in self.log.back_from(head.place):
                if not head.may_delete(turn):
                    break
                self.store.delete(turn_key(turn.id))
            if head.forked_from is not None and not head.forks:
                self.records.change(head.owner, head.forked_from, lambda origin: _without_fork(origin, head))
        except (SessionError, StoreUnavailable, StoreFull, StoreCorrupt) as error:
            logger.warning("what session %s has left is to be collected later: %s", head.id, error)

    def statistics(self) -> TierStatistics:
        return self.tiers.statistics()

    def flush(self) -> None:
        """Returns when the states of all committed turns are in the store."""
        self.tiers.flush()

    def close(self) -> None:
        """Cancels the turns under way, commits those that have ended, and stores their states."""
        self._runner.close()
        self.tiers.close()

    def _forget(self, head: SessionHead, states: Iterable[TakenState]) -> None:
        self.tiers.forget([StateKey(head.owner, state.digest) for state in states])

    def _resolve(self, head: SessionHead, at: Place | None) -> tuple[LogPlace, tuple[TakenState, ...]]:
        """A place, and the states taken on the way there. Raises InvalidRequest, and SessionNotFound when the log never
        was there."""
        if at is None:
            return head.place, head.states
        given = [name for name in ("turn", "position", "snapshot") if getattr(at, name) is not None]
        if len(given) != 1:
            raise InvalidRequest("place", "must name one of turn, position and snapshot")
        place = None
        if at.snapshot is not None:
            if named := head.snapshots.get(at.snapshot):
                return named.place, named.states
        elif at.position is not None:
            place = self.log.place_at(head.place, at.position)
        elif at.turn is not None:
            number = at.turn if at.turn >= 0 else head.place.number + at.turn
            place = self.log.place_of_turn(head.place, number)
        if place is None:
            raise SessionNotFound(f"the session has no such {given[0]}")
        return place, head.states_before(place.position)


def _without_fork(origin: SessionHead, fork: SessionHead) -> SessionHead:
    """Another session may have the id of the one that was forked."""
    return origin.without_fork() if origin.key == fork.origin else origin


def new_session_id() -> str:
    return f"sess_{uuid.uuid4().hex}"


def _ignore(_: object) -> None:
    """For callers who want the result only."""
