"""Collection deletes what no session reaches, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unspool.requests import InvalidRequest, SamplingParams
from unspool.sessions import Place, SessionNotFound, Sessions, TurnRequest, collect, verify
from unspool.sessions.collection import DAY, HOUR
from unspool.sessions.log_digest import LogDigest
from unspool.sessions.turn import Turn
from unspool.sessions.turn_log import turn_key
from unspool.store import Entry, Store
from unspool.store.memory import MemoryStore

Open = Callable[..., Sessions]

GREEDY = SamplingParams(temperature=0.0)


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def turn(tokens: tuple[int, ...] = (), max_tokens: int = 2, key: str | None = None) -> TurnRequest:
    return TurnRequest(tokens=tokens, max_tokens=max_tokens, sampling=GREEDY, idempotency_key=key)


class Clock:
    """The time that stores write and collections read."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
def spoken(clock: Clock, sessions: Sessions) -> Sessions:
    """Session s of four turns, an hour and a second old."""
    sessions.create("me", "s")
    for number in range(4):
        sessions.generate("me", "s", turn(text(5, number)))
        sessions.flush()
    clock.now += HOUR + 1
    return sessions


def keys(store: Store, prefix: str = "") -> set[str]:
    return {entry.key for entry in store.list(prefix)}


def test_what_is_in_use_stays(spoken: Sessions, store: Store) -> None:
    before = keys(store)
    done = collect(store)
    assert (done.sessions, done.turns, done.states, done.quarantined, done.num_bytes) == (0, 0, 0, 0, 0)
    assert keys(store) == before and len(keys(store, "turns/")) == 4


def test_what_was_taken_back_goes(spoken: Sessions, store: Store, clock: Clock) -> None:
    turns = [turn_key(turn.id) for turn, _ in spoken.log.back_from(spoken.records.read("me", "s").place)]
    spoken.rollback("me", "s", Place(turn=2))
    orphans = {"states/model/me/digest", "states/model/you/digest"}
    for key in orphans:
        store.put(key, b"of nobody")
    clock.now += HOUR
    sizes = {entry.key: entry.num_bytes for entry in store.list("")}
    planned = collect(store, dry_run=True)
    assert keys(store) == set(sizes) and planned.dry_run
    done = collect(store)
    assert (done.turns, done.states) == (2, 2) == (planned.turns, planned.states)
    gone = set(sizes) - keys(store)
    assert gone == orphans | set(turns[:2])
    assert done.num_bytes == planned.num_bytes == sum(sizes[key] for key in gone)
    assert spoken.info("me", "s").position == 14
    assert verify(spoken, "me", "s").holds()


def test_a_snapshot_holds_what_it_reaches(spoken: Sessions, store: Store) -> None:
    whole = spoken.tokens("me", "s")
    spoken.snapshot("me", "s", "end")
    spoken.rollback("me", "s", Place(turn=1))
    spoken.generate("me", "s", turn(text(3)))
    assert collect(store).turns == 0
    spoken.rollback("me", "s", Place(snapshot="end"))
    assert spoken.tokens("me", "s") == whole
    spoken.delete_snapshot("me", "s", "end")
    spoken.rollback("me", "s", Place(turn=1))
    assert collect(store).turns == 3  # what came after the first; the other line is too young


def test_forks_hold_what_they_share(spoken: Sessions, store: Store) -> None:
    spoken.fork("me", "s", Place(turn=3), new="fork")
    log = spoken.tokens("me", "fork")
    spoken.delete("me", "s")
    assert collect(store).turns == 1  # a session that has forks deletes nothing itself
    assert spoken.tokens("me", "fork") == log
    spoken.tiers.drop_memory()
    assert spoken.generate("me", "fork", turn()).state_source == "store"
    spoken.delete("me", "fork")
    assert collect(store).turns == 3
    assert not keys(store, "states/")


def test_a_turn_that_a_key_repeats_stays(clock: Clock, sessions: Sessions, store: Store) -> None:
    sessions.create("me", "s")
    sessions.generate("me", "s", turn(text(5)))
    first = sessions.generate("me", "s", turn(text(3), key="k"))
    sessions.generate("me", "s", turn(text(3, 1)))
    sessions.rollback("me", "s", Place(turn=0))
    clock.now += 2 * HOUR
    assert collect(store).turns == 2
    again = sessions.generate("me", "s", turn(text(3), key="k"))
    assert again.is_repeated and again.tokens == first.tokens


def test_what_is_young_stays(spoken: Sessions, store: Store, clock: Clock) -> None:
    """A commit under way has written its turn and its state, and not yet its head."""
    record = Turn(
        parent=None, number=1, start=0, tokens=b"\0" * 8, given=2, before=LogDigest(), made_by="k", finish_reason="stop"
    )
    store.put(turn_key(record.id), record.encode())
    store.put("states/model/me/digest", b"a state")
    clock.now += HOUR - 1
    assert collect(store).turns == collect(store).states == 0
    done = collect(store, older_than_seconds=HOUR - 1)
    assert (done.turns, done.states) == (1, 1)
    assert len(keys(store, "turns/")) == 4


def test_quarantine_lasts_a_week(spoken: Sessions, store: Store, clock: Clock) -> None:
    store.put("quarantine/states/model/me/digest", b"a bad state")
    clock.now += 7 * DAY - 1
    assert collect(store, older_than_seconds=0).quarantined == 0
    clock.now += 1
    assert collect(store).quarantined == 1


def test_sessions_that_nobody_uses_go_when_it_is_asked_for(spoken: Sessions, store: Store, clock: Clock) -> None:
    spoken.create("you", "old")
    spoken.append("you", "old", text(9))
    spoken.flush()
    clock.now += 3 * DAY
    spoken.snapshot("me", "s", "a")  # a change like any other
    clock.now += 1 * DAY
    assert collect(store).sessions == 0
    planned = collect(store, idle_days=3.5, dry_run=True)
    assert (planned.sessions, planned.turns) == (1, 1)
    assert spoken.info("you", "old").position == 9
    done = collect(store, idle_days=3.5)
    assert (done.sessions, done.turns, done.states) == (1, 1, 1)
    with pytest.raises(SessionNotFound):
        spoken.info("you", "old")
    assert verify(spoken, "me", "s").holds()
    assert collect(store, idle_days=0).sessions == 1
    assert keys(store) == set()


def test_idle_means_no_younger_than_the_grace(spoken: Sessions, store: Store) -> None:
    assert collect(store, idle_days=0, older_than_seconds=2 * HOUR).sessions == 0
    assert collect(store, idle_days=0).sessions == 1


def test_a_session_that_changes_just_then_is_not_deleted(spoken: Sessions, store: Store) -> None:
    class Changing(MemoryStore):
        """The session gets a turn between the look at it and its deletion."""

        def swap_head(self, key: str, expected: int | None, value: bytes | None, *rest: object) -> int | None:
            if value is None:
                spoken.append("me", "s", text(2))
            return store.swap_head(key, expected, value, *rest)  # type: ignore[arg-type]

    changing = Changing(1 << 30)
    for name in ("get", "list", "read_head", "delete"):
        setattr(changing, name, getattr(store, name))
    assert collect(changing, idle_days=0).sessions == 0
    assert spoken.info("me", "s").position == 30
    assert verify(spoken, "me", "s").holds()


def test_a_damaged_session_keeps_all_turns_and_its_owners_states(spoken: Sessions, store: Store, clock: Clock) -> None:
    spoken.rollback("me", "s", Place(turn=2))
    for owner in ("me", "you"):
        store.put(f"states/model/{owner}/digest", b"of nobody, or of the broken one")
    assert store.swap_head("sessions/me/broken", None, b'{"format": "unspool.session.2"}') is not None
    clock.now += 2 * HOUR
    done = collect(store, idle_days=100)
    assert (done.turns, done.states, done.sessions) == (0, 1, 0)
    assert "states/model/me/digest" in keys(store)
    assert len(done.damaged) == 1 and "sessions/me/broken: the record of a session is damaged" in done.damaged[0]
    store.delete("sessions/me/broken")
    done = collect(store)
    assert (done.turns, done.states) == (2, 1)


def test_a_damaged_turn_keeps_all_turns(spoken: Sessions, store: Store) -> None:
    """What is before it cannot be told."""
    ids = [turn.id for turn, _ in spoken.log.back_from(spoken.records.read("me", "s").place)]
    store.delete(turn_key(ids[1]))
    done = collect(store, older_than_seconds=0)
    assert done.turns == 0 and len(keys(store, "turns/")) == 3
    assert len(done.damaged) == 1 and ids[1] in done.damaged[0]


def test_a_fork_made_behind_the_scan_is_seen(spoken: Sessions, store: Store) -> None:
    """A fork appears where the scan has been, of a session that goes back before the scan gets there."""
    expected = spoken.tokens("me", "s")

    class Forking(MemoryStore):
        listed = 0

        def list(self, prefix: str) -> Iterator[Entry]:
            entries = store.list(prefix)
            if prefix == "sessions/" and not Forking.listed:
                Forking.listed = 1
                spoken.fork("me", "s", new="a-fork")
                spoken.rollback("me", "s", Place(turn=0))
            return entries

    forking = Forking(1 << 30)
    for name in ("get", "read_head", "delete", "swap_head"):
        setattr(forking, name, getattr(store, name))
    assert collect(forking, older_than_seconds=0).turns == 0
    assert spoken.tokens("me", "a-fork") == expected


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("older_than_seconds", {"older_than_seconds": -1}),
        ("older_than_seconds", {"older_than_seconds": float("nan")}),
        ("idle_days", {"idle_days": -0.5}),
    ],
)
def test_a_negative_age_is_refused(store: Store, field: str, arguments: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: must not be negative"):
        collect(store, **arguments)  # type: ignore[arg-type]


def act(sessions: Sessions, names: list[str], name: str, what: str, position: int) -> None:
    match what:
        case "append":
            sessions.append("me", name, text(3, position))
        case "fork":
            names.append(sessions.fork("me", name, Place(position=position)).id)
        case "rollback":
            sessions.rollback("me", name, Place(position=position))
        case "snapshot":
            sessions.snapshot("me", name, "x", Place(position=position))
        case "collect":
            collect(sessions.store, older_than_seconds=0)
        case "delete" if len(names) > 1:
            sessions.delete("me", name)
            names.remove(name)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_was_done_only_what_nobody_reaches_goes(open_sessions: Open, data: st.DataObject) -> None:
    store = MemoryStore(1 << 30)
    sessions = open_sessions(store)
    names = [sessions.create("me").id]
    for _ in range(data.draw(st.integers(1, 15))):
        name = data.draw(st.sampled_from(names))
        position = data.draw(st.integers(0, sessions.info("me", name).position))
        what = data.draw(st.sampled_from(["append", "append", "fork", "rollback", "snapshot", "delete", "collect"]))
        act(sessions, names, name, what, position)
    sessions.flush()
    heads = [sessions.records.read("me", name) for name in names]
    places = [place for head in heads for place in (head.place, *(named.place for named in head.snapshots.values()))]
    logs = [sessions.log.tokens(place) for place in places]
    reached = {turn_key(turn.id) for place in places for turn, _ in sessions.log.back_from(place)}
    done = collect(store, older_than_seconds=0)
    assert not done.damaged
    assert keys(store, "turns/") == reached
    assert [sessions.log.tokens(place) for place in places] == logs
    named = {state.digest for head in heads for state in head.wanted_states}
    assert {key.rpartition("/")[2] for key in keys(store, "states/")} <= named
    assert collect(store, older_than_seconds=0) == replace(done, turns=0, states=0, num_bytes=0)


def test_the_states_of_another_model_stay_while_they_are_named(
    spoken: Sessions, store: Store, open_sessions: Open
) -> None:
    other = open_sessions(store, replace(spoken.identity, weights="x" * 64))
    other.generate("me", "s", turn(text(2)))
    other.flush()
    made = keys(store, "states/")
    assert len({key.split("/")[1] for key in made}) == 2
    collect(store, older_than_seconds=0)
    named = {state.digest for state in spoken.records.read("me", "s").states}
    left = [key.split("/") for key in keys(store, "states/")]
    assert {model for _, model, _, _ in left} == {key.split("/")[1] for key in made}
    assert {digest for *_, digest in left} == named
