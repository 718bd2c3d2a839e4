"""What is mutable about a session: where its log ends, and the places in it that have names."""

import json
import re
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unspool.requests import InvalidRequest
from unspool.sessions.turn import Turn
from unspool.store import StoreCorrupt

FORMAT = "unspool.session.1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_SNAPSHOTS = 256
STATES_OF_A_SNAPSHOT = 4
REMEMBERED_RESULTS = 16


def check_name(parameter: str, name: str) -> None:
    """Raises InvalidRequest unless it may name an owner, a session or a snapshot, and be a part of a store's key."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            parameter, "must be 1 to 64 letters, digits, dots, dashes or underscores, a letter or digit first"
        )


@dataclass(frozen=True)
class LogPlace:
    """The log's first `position` tokens, the last of them in turn `turn`; no turn before the first token."""

    turn: str | None = None
    position: int = 0
    number: int = 0
    """Of the turn."""


@dataclass(frozen=True)
class TakenState:
    """A state that was taken after a turn; it may have been given up since."""

    position: int
    """Tokens that it has consumed: all of the log after that turn but the last one."""
    digest: str
    """Of these tokens."""
    number: int
    """Of the turn."""


@dataclass(frozen=True)
class CommittedTurn:
    generation: int
    turn: str


@dataclass(frozen=True)
class NamedPlace:
    """A snapshot: a place of the log, and the states that were taken on the way there. The log may have been taken back
    and gone another way since."""

    place: LogPlace
    states: tuple[TakenState, ...]
    created: float


@dataclass(frozen=True, kw_only=True)
class SessionHead:
    """A session as it is between turns. `generation` grows by one with every change of its log."""

    id: str
    owner: str
    tokenizer: str
    """The fingerprint of what gives the tokens their meaning."""
    generation: int = 0
    place: LogPlace = LogPlace()
    states: tuple[TakenState, ...] = ()
    """Where states were taken, by position."""
    snapshots: dict[str, NamedPlace] = field(default_factory=dict)
    results: dict[str, CommittedTurn] = field(default_factory=dict)
    """What turns with these idempotency keys came to, the latest last."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Its own for ever, unlike the id, which another session may have after it."""
    forked_from: str | None = None
    """The id of the session that this is a fork of; `origin` is its key."""
    origin: str | None = None
    forks: int = 0
    """Forks of this session that may still use its turns, at most: while there are any it deletes none."""
    inherited_until: int = 0
    """States before this position were its origin's, and those before `shared_until` are its forks' too. A state that
    is deleted although another wants it costs that one a replay."""
    shared_until: int = 0
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    def states_before(self, position: int) -> tuple[TakenState, ...]:
        """Those that a log may go on from that is this one's up to a position."""
        return tuple(state for state in self.states if state.position < position)

    def went_on(self, place: LogPlace, taken: TakenState | None, idempotency_key: str | None) -> "SessionHead":
        """After a turn, with the state that was taken then. States that are spaced too closely are left out: the older
        they are, the fewer remain, as many as the logarithm of the number of turns."""
        states = list(self.states)
        if taken is not None:
            states = [state for state in states if state.position != taken.position] + [taken]
        kept = tuple(state for state in states if _is_kept(state.number, place.number))
        return self._moved(place, kept, idempotency_key)

    def went_back(self, place: LogPlace, states: tuple[TakenState, ...]) -> "SessionHead":
        """To an earlier place, with the states that were taken on the way there."""
        return self._moved(place, states, None)

    def _moved(self, place: LogPlace, states: tuple[TakenState, ...], idempotency_key: str | None) -> "SessionHead":
        generation = self.generation + 1
        results = dict(self.results)
        if idempotency_key is not None:
            assert place.turn is not None
            results[idempotency_key] = CommittedTurn(generation, place.turn)
            results = dict(list(results.items())[-REMEMBERED_RESULTS:])
        return replace(
            self,
            place=place,
            generation=generation,
            states=states,
            results=results,
            updated=time.time(),
        )

    def forked_at(self, position: int) -> "SessionHead":
        """Once more."""
        return replace(self, shared_until=max(self.shared_until, position), forks=self.forks + 1)

    def without_fork(self) -> "SessionHead":
        """One of its forks is gone, and had none itself. With the last of them its turns are its own again."""
        left = max(self.forks - 1, 0)
        return replace(self, forks=left, shared_until=self.shared_until if left else 0)

    @property
    def wanted_states(self) -> tuple[TakenState, ...]:
        """Those of its log and of its snapshots."""
        return (*self.states, *(state for snapshot in self.snapshots.values() for state in snapshot.states))

    def no_longer_wanted(self, before: "SessionHead") -> list[TakenState]:
        """States that the session wanted before and nobody does now, as far as it knows."""
        wanted = {state.digest for state in self.wanted_states}
        return [state for state in before.wanted_states if state.digest not in wanted and not self.shares(state)]

    def shares(self, state: TakenState) -> bool:
        """Whether another session may want the state too."""
        return state.position < max(self.inherited_until, self.shared_until)

    def may_delete(self, turn: Turn) -> bool:
        """Whether nobody else uses a turn of its log."""
        return turn.made_by == self.key and not self.forks

    def encode(self) -> bytes:
        return json.dumps({"format": FORMAT} | asdict(self)).encode()

    @classmethod
    def decode(cls, key: str, data: bytes) -> "SessionHead":
        """Raises StoreCorrupt, naming the key, for what no session wrote."""
        try:
            values: dict[str, Any] = json.loads(data)
            if values.pop("format") != FORMAT:
                raise ValueError("it is of another version")
            named = {
                name: NamedPlace(LogPlace(**named["place"]), _read_states(named["states"]), named["created"])
                for name, named in values.pop("snapshots").items()
            }
            states = _read_states(values.pop("states"))
            place = LogPlace(**values.pop("place"))
            results = {key: CommittedTurn(**result) for key, result in values.pop("results").items()}
            return cls(**values, place=place, states=states, snapshots=named, results=results)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"{key}: the record of a session is damaged ({error}); restore it from a backup or delete it"
            raise StoreCorrupt(message) from error


def _read_states(values: list[dict[str, Any]]) -> tuple[TakenState, ...]:
    return tuple(TakenState(**state) for state in values)


def _is_kept(number: int, newest: int) -> bool:
    """Whether the state after turn `number` is still wanted after turn `newest`: of those of an age between 2^k and
    2^(k+1) turns only multiples of 2^(k-1), so that going back costs no more than a part of the way."""
    age = max(newest - number, 1)
    return number % (1 << max(age.bit_length() - 2, 0)) == 0
