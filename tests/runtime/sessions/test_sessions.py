"""Sessions on a tiny model: turns, forks, going back, snapshots, owners, and finding them again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from unspool.engine import Engine
from unspool.requests import GenerationRequest, InvalidRequest, SamplingParams
from unspool.sessions import (
    Place,
    SessionBusy,
    SessionConflict,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
    Sessions,
    TurnFailed,
    TurnRequest,
    TurnResult,
)
from unspool.store import StateIdentity, Store
from unspool.token_bytes import pack_tokens, unpack_tokens

Open = Callable[..., Sessions]
GREEDY = SamplingParams(temperature=0.0)


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def turn(tokens: tuple[int, ...] = (), max_tokens: int = 8, **fields: object) -> TurnRequest:
    return TurnRequest(tokens=tokens, max_tokens=max_tokens, sampling=GREEDY, **fields)  # type: ignore[arg-type]


def log_of(sessions: Sessions, session: str, owner: str = "me") -> tuple[int, ...]:
    return unpack_tokens(sessions.tokens(owner, session))


def continuation(engine: Engine, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What the engine itself makes of a prompt."""
    done, made = threading.Event(), []

    def sink(event: object) -> None:
        made.extend([event.token] if hasattr(event, "token") else [])
        if hasattr(event, "reason"):
            done.set()

    request = GenerationRequest(request_id="direct", prompt=tokens, max_tokens=count, sampling=GREEDY, use_cache=False)
    engine.submit(request, sink)
    assert done.wait(60)
    return tuple(made)


def test_turns_are_one_text(sessions: Sessions, engine: Engine) -> None:
    sessions.create("me", "s")
    expected: tuple[int, ...] = ()
    for number, length in enumerate([40, 1, 7], start=1):
        expected += text(length, number)
        result = sessions.generate("me", "s", turn(text(length, number)))
        assert result.tokens == continuation(engine, expected, 8)
        expected += result.tokens
        assert (result.generation, result.turn, result.position) == (number, number, len(expected))
    assert log_of(sessions, "s") == expected
    assert sessions.info("me", "s").position == len(expected)


def test_adding_and_generating_may_be_turns_of_their_own(sessions: Sessions, engine: Engine) -> None:
    sessions.create("me", "s")
    for length in (1, 1, 30, 1):
        assert sessions.append("me", "s", text(length, length)).tokens == ()
    tokens = text(1, 1) * 2 + text(30, 30) + text(1, 1)
    result = sessions.generate("me", "s", turn(max_tokens=5))
    assert result.tokens == continuation(engine, tokens, 5)
    assert sessions.generate("me", "s", turn(max_tokens=3)).tokens == continuation(engine, tokens + result.tokens, 3)


def test_a_turn_reads_only_what_is_new(sessions: Sessions) -> None:
    sessions.create("me", "s")
    first = sessions.generate("me", "s", turn(text(500)))
    assert (first.state_source, first.replayed_tokens) == ("empty", 0)
    second = sessions.generate("me", "s", turn(text(3, 1)))
    assert (second.state_source, second.replayed_tokens) == ("memory", 1)
    sessions.tiers.drop_memory()
    third = sessions.generate("me", "s", turn(text(3, 1)))
    assert (third.state_source, third.replayed_tokens) == ("store", 1)


def test_forks_go_their_own_ways(sessions: Sessions, engine: Engine) -> None:
    sessions.create("me", "trunk")
    sessions.append("me", "trunk", text(100))
    forks = [sessions.fork("me", "trunk", new=f"fork{n}").id for n in range(3)]
    results = {fork: sessions.generate("me", fork, turn(text(5, n))) for n, fork in enumerate(forks)}
    sessions.generate("me", "trunk", turn(text(9, 9)))
    for number, fork in enumerate(forks):
        assert results[fork].replayed_tokens == 1
        assert results[fork].tokens == continuation(engine, text(100) + text(5, number), 8)
        assert sessions.info("me", fork).forked_from == "trunk"
    assert len({log_of(sessions, name) for name in [*forks, "trunk"]}) == 4


def test_going_back_to_a_turn_a_position_and_a_snapshot(sessions: Sessions, engine: Engine) -> None:
    sessions.create("me", "s")
    for number in range(6):
        sessions.append("me", "s", text(20, number))
        if number == 2:
            sessions.snapshot("me", "s", "third")
    whole = log_of(sessions, "s")
    back = sessions.rollback("me", "s", Place(turn=-1))
    assert (back.generation, back.position, back.replay_tokens) == (7, 100, 1)
    back = sessions.rollback("me", "s", Place(position=71))
    assert back.position == 71 and 1 <= back.replay_tokens <= 32
    result = sessions.generate("me", "s", turn())
    assert result.replayed_tokens == back.replay_tokens
    assert result.tokens == continuation(engine, whole[:71], 8)
    back = sessions.rollback("me", "s", Place(snapshot="third"))
    assert (back.position, back.replay_tokens) == (60, 1)
    assert sessions.rollback("me", "s", Place(turn=1)).position == 20
    assert sessions.rollback("me", "s", Place(turn=0)).position == 0
    with pytest.raises(InvalidRequest, match="tokens: must hold at least one token, as the session has none"):
        sessions.generate("me", "s", turn())
    # A snapshot stays where it was, whatever became of the log since.
    assert sessions.rollback("me", "s", Place(snapshot="third")).position == 60
    assert log_of(sessions, "s") == whole[:60]


def test_a_place_that_never_was_is_not_found(sessions: Sessions) -> None:
    sessions.create("me", "s")
    sessions.append("me", "s", text(20))
    for place in (Place(turn=2), Place(turn=-2), Place(position=21), Place(position=-1), Place(snapshot="x")):
        with pytest.raises(SessionNotFound):
            sessions.rollback("me", "s", place)
    for place in (Place(), Place(turn=1, position=3)):
        with pytest.raises(InvalidRequest, match="place"):
            sessions.fork("me", "s", place)
    assert sessions.info("me", "s").generation == 1


def test_snapshots_have_names(sessions: Sessions) -> None:
    sessions.create("me", "s")
    sessions.append("me", "s", text(20))
    sessions.snapshot("me", "s", "a")
    sessions.append("me", "s", text(5))
    assert sessions.snapshot("me", "s", "b", Place(position=22)).snapshots == {"a": 20, "b": 22}
    assert sessions.delete_snapshot("me", "s", "a").snapshots == {"b": 22}
    with pytest.raises(SessionNotFound):
        sessions.delete_snapshot("me", "s", "a")
    with pytest.raises(InvalidRequest, match="snapshot"):
        sessions.snapshot("me", "s", "../b")


def test_others_sessions_are_not_there(sessions: Sessions) -> None:
    sessions.create("me", "s")
    sessions.append("me", "s", text(20))
    sessions.create("you", "mine")
    asks = [
        lambda: sessions.info("you", "s"),
        lambda: sessions.generate("you", "s", turn(text(3))),
        lambda: sessions.fork("you", "s"),
        lambda: sessions.rollback("you", "s", Place(turn=0)),
        lambda: sessions.snapshot("you", "s", "x"),
        lambda: sessions.delete("you", "s"),
        lambda: sessions.tokens("you", "s"),
    ]
    for ask in asks:
        with pytest.raises(SessionNotFound) as error:
            ask()
        with pytest.raises(SessionNotFound) as unknown:
            sessions.info("you", "never")
        assert str(error.value) == str(unknown.value)
    assert [info.id for info in sessions.list("you")] == ["mine"]
    assert sessions.info("me", "s").generation == 1


def test_sessions_are_listed_by_pages(sessions: Sessions) -> None:
    for number in range(7):
        sessions.create("me", f"s{number}")
    assert [info.id for info in sessions.list("me", limit=3)] == ["s0", "s1", "s2"]
    assert [info.id for info in sessions.list("me", after="s2", limit=9)] == ["s3", "s4", "s5", "s6"]
    with pytest.raises(InvalidRequest, match="limit"):
        sessions.list("me", limit=0)


def test_a_deleted_session_leaves_nothing_that_no_fork_has(sessions: Sessions, store: Store, engine: Engine) -> None:
    sessions.create("me", "a")
    for number in range(3):
        sessions.generate("me", "a", turn(text(10, number)))
    sessions.fork("me", "a", Place(turn=2), new="b")
    expected = log_of(sessions, "b")
    sessions.generate("me", "b", turn(text(4)))
    sessions.flush()
    sessions.delete("me", "a")
    with pytest.raises(SessionNotFound):
        sessions.info("me", "a")
    assert log_of(sessions, "b")[: len(expected)] == expected
    sessions.tiers.drop_memory()
    assert sessions.generate("me", "b", turn(text(4))).state_source == "store"
    sessions.delete("me", "b")
    sessions.create("me", "c")
    sessions.generate("me", "c", turn(text(10)))
    sessions.flush()
    sessions.delete("me", "c")
    left = [entry.key.split("/")[0] for entry in store.list("")]
    assert set(left) <= {"turns", "states"} and len(left) <= 5  # what the fork shared, until the store is collected


def test_a_session_whose_forks_are_gone_shares_nothing(sessions: Sessions, store: Store) -> None:
    sessions.create("me", "a")
    sessions.generate("me", "a", turn(text(10)))
    for fork, of in (("b", "a"), ("c", "a"), ("d", "c")):
        sessions.fork("me", of, new=fork)
        sessions.generate("me", fork, turn(text(4)))
    sessions.flush()
    # While "d" goes on with what "c" had of "a", nothing of it may go, whoever is deleted.
    for gone in ("b", "c"):
        sessions.delete("me", gone)
    expected = log_of(sessions, "d")
    sessions.delete("me", "a")
    sessions.tiers.drop_memory()
    assert log_of(sessions, "d") == expected
    sessions.create("me", "e")
    sessions.append("me", "e", text(10))
    sessions.fork("me", "e", new="f")
    sessions.flush()
    before = len(list(store.list("")))
    sessions.delete("me", "f")
    sessions.delete("me", "e")
    assert len(list(store.list(""))) == before - 4  # two heads, a turn and its state


def test_a_fork_that_went_back_and_forth_deletes_nothing_of_its_origin(sessions: Sessions) -> None:
    sessions.create("me", "a")
    for number in range(2):
        sessions.append("me", "a", text(50, number))
    sessions.fork("me", "a", new="f")
    sessions.snapshot("me", "f", "end")
    sessions.rollback("me", "f", Place(position=50))
    sessions.rollback("me", "f", Place(snapshot="end"))
    sessions.delete("me", "f")
    assert log_of(sessions, "a") == text(50, 0) + text(50, 1)


def test_an_id_that_is_used_again_has_nothing_to_do_with_forks_of_the_first(sessions: Sessions) -> None:
    for fork in ("f1", "f2"):
        sessions.create("me", "diary")
        sessions.append("me", "diary", text(50))
        sessions.fork("me", "diary", new=fork)
        if fork == "f1":
            sessions.delete("me", "diary")
    sessions.delete("me", "f1")
    sessions.delete("me", "diary")
    assert log_of(sessions, "f2") == text(50)


def test_one_writer_at_a_time(sessions: Sessions) -> None:
    sessions.create("me", "s")
    begun = threading.Event()
    running = sessions.begin("me", "s", turn(text(5), max_tokens=100_000), lambda _: begun.set())
    assert begun.wait(60)
    for ask in (
        lambda: sessions.generate("me", "s", turn(text(3))),
        lambda: sessions.rollback("me", "s", Place(turn=0)),
        lambda: sessions.delete("me", "s"),
    ):
        with pytest.raises(SessionBusy):
            ask()
    assert sessions.fork("me", "s", new="before").position == 0
    assert sessions.info("me", "s").generation == 0
    running.cancel()
    with pytest.raises(TurnFailed, match="cancelled; nothing of it was kept") as error:
        running.result(60)
    assert error.value.reason == "cancelled"
    assert sessions.info("me", "s").position == 0
    assert sessions.generate("me", "s", turn(text(3))).turn == 1


def test_a_fork_during_a_turn_does_not_disturb_it(sessions: Sessions) -> None:
    sessions.create("me", "s")
    sessions.append("me", "s", text(30))
    forked = threading.Event()

    def fork_once(_: object) -> None:
        if not forked.is_set():
            forked.set()
            sessions.fork("me", "s", new="fork")

    assert sessions.begin("me", "s", turn(text(5)), fork_once).result(60).generation == 2
    assert sessions.info("me", "fork").position == 30


def test_a_turn_expects_its_generation(sessions: Sessions) -> None:
    sessions.create("me", "s")
    assert sessions.generate("me", "s", turn(text(3), expected_generation=0)).generation == 1
    with pytest.raises(SessionConflict, match="is at 1, not at 0"):
        sessions.generate("me", "s", turn(text(3), expected_generation=0))
    with pytest.raises(SessionConflict):
        sessions.rollback("me", "s", Place(turn=0), expected_generation=0)
    assert sessions.info("me", "s").generation == 1


def test_a_turn_with_a_key_is_run_once(sessions: Sessions, open_sessions: Open, store: Store) -> None:
    sessions.create("me", "s")
    request = turn(text(30), idempotency_key="k 1", expected_generation=0)
    first = sessions.generate("me", "s", request)
    for again in (sessions, open_sessions(store)):
        repeated = again.generate("me", "s", request)
        assert repeated.is_repeated
        assert (repeated.tokens, repeated.generation, repeated.position) == (first.tokens, 1, 38)
    assert sessions.generate("me", "s", replace(request, idempotency_key="k 2", expected_generation=1)).generation == 2


def test_sessions_are_there_after_a_restart(open_sessions: Open, store: Store, engine: Engine) -> None:
    sessions = open_sessions(store)
    sessions.create("me", "s")
    result: TurnResult = sessions.generate("me", "s", turn(text(300)))
    sessions.close()
    again = open_sessions(store)
    assert again.info("me", "s").generation == 1
    expected = continuation(engine, text(300) + result.tokens + text(2), 8)
    result = again.generate("me", "s", turn(text(2)))
    assert result.tokens == expected and result.state_source == "store"


def test_without_its_state_a_session_is_replayed(sessions: Sessions, store: Store, engine: Engine) -> None:
    sessions.create("me", "s")
    first = sessions.generate("me", "s", turn(text(200)))
    sessions.tiers.drop_memory()
    for entry in list(store.list("states/")):
        store.delete(entry.key)
    second = sessions.generate("me", "s", turn(text(2)))
    assert (second.state_source, second.replayed_tokens) == ("replay", 208)
    assert second.tokens == continuation(engine, text(200) + first.tokens + text(2), 8)


def test_states_thin_out_with_age(sessions: Sessions, store: Store) -> None:
    sessions.create("me", "s")
    for number in range(70):
        sessions.append("me", "s", text(2, number))
        sessions.flush()
    states = sessions.records.read("me", "s").states
    assert len(states) <= 16
    assert sum(entry.key.startswith("states/") for entry in store.list("")) == len(states)
    # Going back n turns costs at most about n/2 turns of reading.
    for back in (1, 2, 3, 10, 30, 50):
        target = 70 - back
        nearest = max((state.number for state in states if state.number <= target), default=0)
        assert target - nearest <= max(back / 2, 1)


def test_another_model_does_not_use_the_states(open_sessions: Open, store: Store, identity: StateIdentity) -> None:
    first = open_sessions(store)
    first.create("me", "s")
    expected = first.generate("me", "s", turn(text(100)))
    first.close()
    other = open_sessions(store, replace(identity, weights="x" * 64))
    result = other.generate("me", "s", turn(text(2)))
    assert (result.state_source, result.replayed_tokens) == ("replay", expected.position)
    stranger = open_sessions(store, replace(identity, tokenizer="y" * 64))
    with pytest.raises(SessionMismatch, match="another tokenizer"):
        stranger.generate("me", "s", turn(text(2)))
    assert first.info("me", "s").generation == 2


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (turn((64,)), "tokens"),
        (turn((-1,), max_tokens=0), "tokens"),
        (turn((), max_tokens=0), "tokens"),
        (turn((1,), max_tokens=-1), "max_tokens"),
        (turn((1,), max_tokens=1 << 30), "tokens"),
        (turn((1,), idempotency_key="ü"), "idempotency_key"),
        (turn((1,), stop=("x",)), "stop"),
    ],
)
def test_what_cannot_be_is_refused_by_name(sessions: Sessions, request_: TurnRequest, field: str) -> None:
    sessions.create("me", "s")
    with pytest.raises(InvalidRequest) as error:
        sessions.generate("me", "s", request_)
    assert error.value.field == field
    assert sessions.info("me", "s").generation == 0
    assert sessions.generate("me", "s", turn((1,))).generation == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", "a" * 65, "ü", ".hidden", "a\n"])
def test_names_are_plain(sessions: Sessions, name: str) -> None:
    with pytest.raises(InvalidRequest, match="session|owner"):
        sessions.create("me", name or "a/")
    with pytest.raises(InvalidRequest, match="owner"):
        sessions.create(name, "s")


def test_an_id_is_taken_once(sessions: Sessions) -> None:
    sessions.create("me", "s")
    with pytest.raises(SessionExists):
        sessions.create("me", "s")
    with pytest.raises(SessionExists):
        sessions.fork("me", "s", new="s")
    assert sessions.create("you", "s").position == 0


def test_tokens_are_read_from_any_place(sessions: Sessions) -> None:
    sessions.create("me", "s")
    for number in range(4):
        sessions.append("me", "s", text(10, number))
    whole = sum((text(10, number) for number in range(4)), ())
    for start in (0, 3, 10, 25, 39, 40):
        assert sessions.tokens("me", "s", start) == pack_tokens(whole[start:])
