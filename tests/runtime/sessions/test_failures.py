"""What breaks under a session: its store, its files, its engine. The session is as it was, and the next turn works."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from unspool.engine import Engine, EngineOptions
from unspool.executor import Executor
from unspool.requests import EngineBusy, EngineDead, SamplingParams
from unspool.sessions import Place, SessionBusy, SessionConflict, Sessions, TurnFailed, TurnRequest
from unspool.store import Head, StateIdentity, Store, StoreCorrupt, StoreFull, StoreUnavailable, open_store
from unspool.store.local import LocalStore
from unspool.store.memory import MemoryStore

if TYPE_CHECKING:
    from store_servers import RedisServer

Open = Callable[..., Sessions]
GREEDY = SamplingParams(temperature=0.0)


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def turn(tokens: tuple[int, ...], max_tokens: int = 4, **fields: object) -> TurnRequest:
    return TurnRequest(tokens=tokens, max_tokens=max_tokens, sampling=GREEDY, **fields)  # type: ignore[arg-type]


def test_a_store_that_goes_away_in_a_turn(open_sessions: Open, own_redis_server: Callable[..., RedisServer]) -> None:
    """The turn fails, the session stays; with the store back the same turn is committed."""
    server = own_redis_server()
    store = open_store(server.url, max_bytes=1 << 26)
    sessions = open_sessions(store)
    sessions.create("me", "s")
    before = sessions.generate("me", "s", turn(text(50)))
    sessions.flush()
    killed = threading.Event()

    def kill_once(_: object) -> None:
        if not killed.is_set():
            server.kill()
            killed.set()

    running = sessions.begin("me", "s", turn(text(5), idempotency_key="again"), kill_once)
    with pytest.raises(StoreUnavailable):
        running.result(60)
    with pytest.raises(StoreUnavailable):
        sessions.generate("me", "s", turn(text(5)))
    assert sessions.engine.alive
    server.start()
    assert sessions.info("me", "s").generation == 1
    after = sessions.generate("me", "s", turn(text(5), idempotency_key="again"))
    assert (after.generation, after.position) == (2, before.position + 9)
    assert not after.is_repeated
    store.close()


def test_a_store_that_fills_up_costs_states_first(open_sessions: Open) -> None:
    """States make room for states and for logs; when logs alone fill the store, a turn says so."""
    store = MemoryStore(60_000)
    sessions = open_sessions(store, state_memory=1)
    sessions.create("me", "s")
    full = None
    for number in range(400):
        try:
            sessions.append("me", "s", text(60, number))
        except StoreFull as error:
            full = error
            break
        sessions.flush()
        assert sum(entry.num_bytes for entry in store.list("")) <= 60_000
    assert full is not None and number > 30
    assert sessions.info("me", "s").turns == number
    assert sessions.statistics().stored > 3
    sessions.delete("me", "s")
    sessions.create("me", "t")
    assert sessions.generate("me", "t", turn(text(5))).generation == 1


def test_a_state_too_large_for_its_store_is_replayed(open_sessions: Open) -> None:
    sessions = open_sessions(MemoryStore(15_000), state_memory=1)
    sessions.create("me", "s")
    sessions.generate("me", "s", turn(text(30)))
    sessions.flush()
    result = sessions.generate("me", "s", turn(text(3)))
    assert (result.state_source, result.replayed_tokens) == ("replay", 34)
    assert sessions.statistics().not_stored >= 1


def test_a_full_disk_loses_no_session(tmp_path: Path, open_sessions: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files cannot grow beyond a few kilobytes: states do not fit, logs and heads still do."""
    import resource
    import signal

    store = LocalStore(tmp_path / "store", 1 << 26)
    sessions = open_sessions(store, state_memory=1)
    sessions.create("me", "s")
    sessions.generate("me", "s", turn(text(300)))
    monkeypatch.setattr("unspool.store.interface.SMALL_BYTES", 1 << 10)
    monkeypatch.setattr("unspool.store.local.SMALL_BYTES", 1 << 10)
    sessions.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, limits[1]))
    try:
        with pytest.raises(StoreFull):
            sessions.generate("me", "s", turn(text(30_000, 1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sessions.info("me", "s").generation == 1
    assert sessions.generate("me", "s", turn(text(3))).generation == 2
    sessions.close()
    store.close()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "of another session", "empty"])
def test_a_damaged_state_is_put_aside_and_its_log_replayed(
    sessions: Sessions, store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("s", "other"):
        sessions.create("me", name)
        sessions.generate("me", name, turn(text(100, len(name))))
        sessions.flush()
    sessions.tiers.drop_memory()
    (key, _), (other, _) = [(entry.key, entry) for entry in store.list("states/")]
    own = sessions.records.read("me", "s").states[0].digest
    key, other = (key, other) if own in key else (other, key)
    data = store.get(key)
    damaged = {
        "flipped": data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
        "truncated": data[:-1],
        "of another session": store.get(other),
        "empty": b"",
    }[damage]
    store.delete(key)
    store.put(key, damaged)
    with caplog.at_level(logging.WARNING):
        result = sessions.generate("me", "s", turn(text(3)))
    assert (result.state_source, result.replayed_tokens) == ("replay", 104)
    assert sessions.statistics().rejected == 1 and "its log is replayed instead" in caplog.text
    assert store.get(f"quarantine/{key}") == damaged and store.get(key) is None


def test_a_damaged_log_is_an_error_that_names_it(sessions: Sessions, store: Store) -> None:
    sessions.create("me", "s")
    sessions.append("me", "s", text(100))
    sessions.append("me", "s", text(100))
    sessions.tiers.drop_memory()
    for entry in list(store.list("states/")):
        store.delete(entry.key)
    first = [turn for turn, _ in sessions.log.back_from(sessions.records.read("me", "s").place)][-1]
    data = store.get(f"turns/{first.id}")
    store.delete(f"turns/{first.id}")
    with pytest.raises(StoreCorrupt, match=f"turns/{first.id}: the record of a turn is missing"):
        sessions.append("me", "s", text(3))
    for place in range(0, len(data), 7):
        store.delete(f"turns/{first.id}")
        store.put(f"turns/{first.id}", data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(StoreCorrupt, match=f"turns/{first.id}: the record of a turn is damaged"):
            sessions.append("me", "s", text(3))
    store.delete(f"turns/{first.id}")
    store.put(f"turns/{first.id}", data)
    assert sessions.append("me", "s", text(3)).turn == 3


def test_a_damaged_head_is_an_error_that_names_it(sessions: Sessions, store: Store) -> None:
    sessions.create("me", "s")
    for damaged in (b"", b"{}", b"[]", b'{"format": "unspool.session.2"}', b"\xff"):
        store.swap_head("sessions/me/s", store.read_head("sessions/me/s").version, damaged)
        with pytest.raises(StoreCorrupt, match="sessions/me/s: the record of a session is damaged"):
            sessions.info("me", "s")


def test_an_engine_that_dies_in_a_turn(
    executor: Executor, store: Store, identity: StateIdentity, open_sessions: Open
) -> None:
    class Breaking:
        """The executor itself, until it is told to break."""

        broken = False

        def __getattr__(self, name: str) -> object:
            return getattr(executor, name)

        def logits(self, *arguments: object) -> torch.Tensor:
            if self.broken:
                raise RuntimeError("out of order")
            return executor.logits(*arguments)

    breaking = Breaking()
    engine = Engine(breaking, EngineOptions(max_slots=1))
    engine.start()
    sessions = Sessions(engine, store, identity)
    sessions.create("me", "s")
    sessions.generate("me", "s", turn(text(5)))
    breaking.broken = True
    with pytest.raises(TurnFailed, match="the engine failed"):
        sessions.generate("me", "s", turn(text(5)))
    with pytest.raises(EngineDead):
        sessions.generate("me", "s", turn(text(5)))
    sessions.close()
    again = open_sessions(store)
    assert again.info("me", "s").generation == 1
    assert again.generate("me", "s", turn(text(5))).generation == 2


def test_a_full_engine_begins_nothing(executor: Executor, store: Store, identity: StateIdentity) -> None:
    engine = Engine(executor, EngineOptions(max_slots=1, max_queue=1))
    engine.start()
    sessions = Sessions(engine, store, identity)
    for name in "abc":
        sessions.create("me", name)
    begun = threading.Event()
    first = sessions.begin("me", "a", turn(text(5), max_tokens=100_000), lambda _: begun.set())
    assert begun.wait(60)
    second = sessions.begin("me", "b", turn(text(5)), lambda _: None)
    with pytest.raises(EngineBusy):
        sessions.begin("me", "c", turn(text(5)), lambda _: None)
    first.cancel()
    assert second.result(60).generation == 1
    assert sessions.generate("me", "c", turn(text(5))).generation == 1
    engine.shutdown()
    sessions.close()


class Refusing(MemoryStore):
    """Deletes nothing and gives back no lease, as a store that is away for that moment."""

    def delete(self, key: str) -> None:
        raise StoreUnavailable("away")

    def release(self, key: str, holder: str) -> None:
        raise StoreUnavailable("away")


def test_what_is_committed_is_reported_whatever_tidying_up_comes_to(open_sessions: Open) -> None:
    store = Refusing(1 << 26)
    sessions = open_sessions(store, lease_seconds=60)
    sessions.create("me", "s")
    for number in range(12):  # states are thinned out meanwhile
        assert sessions.append("me", "s", text(5, number)).generation == number + 1
    assert sessions.rollback("me", "s", Place(turn=2)).position == 10
    sessions.flush()
    sessions.delete("me", "s")
    assert sessions.list("me") == []


def test_a_turn_that_could_not_begin_leaves_nothing_busy(open_sessions: Open) -> None:
    class Failing(Refusing):
        fails = False

        def read_head(self, key: str) -> Head | None:
            if self.fails:
                raise StoreUnavailable("away")
            return super().read_head(key)

    store = Failing(1 << 26)
    sessions = open_sessions(store, lease_seconds=60)
    sessions.create("me", "s")
    store.fails = True
    with pytest.raises(StoreUnavailable):
        sessions.append("me", "s", text(5))
    store.fails = False
    assert sessions.append("me", "s", text(5)).generation == 1


def test_closing_cancels_what_is_under_way(store: Store, open_sessions: Open) -> None:
    sessions = open_sessions(store)
    sessions.create("me", "s")
    begun = threading.Event()
    running = sessions.begin("me", "s", turn(text(5), max_tokens=1_000_000), lambda _: begun.set())
    assert begun.wait(60)
    sessions.close()
    with pytest.raises(TurnFailed, match="cancelled"):
        running.result(0)
    with pytest.raises(EngineDead, match="closed"):
        sessions.generate("me", "s", turn(text(5)))


def test_two_processes_cannot_both_commit(engine: Engine, store: Store, open_sessions: Open) -> None:
    """Without leases it is the generation that decides; with them the second does not even begin."""
    first, second = open_sessions(store), open_sessions(store)
    first.create("me", "s")
    begun = threading.Event()
    running = first.begin("me", "s", turn(text(5), max_tokens=3000), lambda _: begun.set())
    assert begun.wait(60)
    assert second.generate("me", "s", turn(text(9))).generation == 1
    with pytest.raises(SessionConflict):
        running.result(60)
    assert first.info("me", "s").position == 13
    leased = [open_sessions(store, lease_seconds=60) for _ in range(2)]
    begun.clear()
    running = leased[0].begin("me", "s", turn(text(5), max_tokens=3000), lambda _: begun.set())
    assert begun.wait(60)
    with pytest.raises(SessionBusy):
        leased[1].generate("me", "s", turn(text(9)))
    assert running.result(60).generation == 2
    assert leased[1].generate("me", "s", turn(text(9))).generation == 3
