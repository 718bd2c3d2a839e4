"""What callers ask of sessions and what they are told."""

from dataclasses import dataclass
from typing import Literal

from unspool.constraint import Constraint
from unspool.requests import SamplingParams
from unspool.sessions.head import SessionHead

StateSource = Literal["empty", "memory", "store", "replay"]
"""Where a turn's state came from: the session had none yet, memory, the store, or the log alone."""


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A session between turns."""

    id: str
    generation: int
    position: int
    """Tokens of its log."""
    turns: int
    forked_from: str | None
    snapshots: dict[str, int]
    """Positions by name."""
    created: float
    """Seconds since 1970 (UTC), as `updated` is."""
    updated: float

    @classmethod
    def of(cls, head: SessionHead) -> "SessionInfo":
        return cls(
            id=head.id,
            generation=head.generation,
            position=head.place.position,
            turns=head.place.number,
            forked_from=head.forked_from,
            snapshots={name: snapshot.place.position for name, snapshot in head.snapshots.items()},
            created=head.created,
            updated=head.updated,
        )


@dataclass(frozen=True, kw_only=True)
class TurnRequest:
    """Tokens to add to a session and how to continue them; fields are those of `GenerationRequest`."""

    tokens: tuple[int, ...] = ()
    """May be empty when the session has some."""
    max_tokens: int = 16
    """0 only adds the tokens."""
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    continues_text: bool = False
    skip_special_tokens: bool = True
    constraint: Constraint | None = None
    logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None
    expected_generation: int | None = None
    """Refuse the turn unless the session is at this generation."""
    idempotency_key: str | None = None
    """A turn that was committed with this key is reported again instead of being run again."""


@dataclass(frozen=True, kw_only=True)
class TurnResult:
    """A turn that was committed."""

    generation: int
    position: int
    """Tokens of the log with this turn."""
    turn: int
    """Turns of the log with this one."""
    tokens: tuple[int, ...]
    """Those that were generated."""
    finish_reason: str
    stopped_by: int | str | None = None
    state_source: StateSource = "empty"
    replayed_tokens: int = 0
    """Tokens of the log that were read again, as no state was at hand that had consumed them. The last one of the log
    is always among them: no state has."""
    restore_seconds: float = 0.0
    """Finding the state and reading it."""
    is_repeated: bool = False
    """Whether this was committed earlier, with the same idempotency key."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Where a session went back to."""

    generation: int
    position: int
    replay_tokens: int
    """What the next turn will have to read again."""


@dataclass(frozen=True)
class Place:
    """A place in a session's log: after so many turns, after so many tokens, or a snapshot's. Exactly one is given.

    A negative `turn` counts turns back from the end.
    """

    turn: int | None = None
    position: int | None = None
    snapshot: str | None = None
