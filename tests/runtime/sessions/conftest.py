"""A tiny model whose bits do not depend on how a text is cut, and sessions on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from store_servers import own_redis_server, redis_binary
from tiny_model import IDENTITY, tiny_executor

from unspool.engine import Engine, EngineOptions
from unspool.executor import Executor
from unspool.sessions import SessionOptions, Sessions
from unspool.store import StateIdentity, Store
from unspool.store.memory import MemoryStore

__all__ = ["own_redis_server", "redis_binary"]


@pytest.fixture(scope="session")
def executor() -> Executor:
    return tiny_executor()


@pytest.fixture(scope="session")
def identity() -> StateIdentity:
    return IDENTITY


@pytest.fixture(scope="session")
def engine(executor: Executor) -> Iterator[Engine]:
    running = Engine(executor, EngineOptions(max_slots=4, prefill_chunk=32))
    running.start()
    yield running
    running.shutdown()


@pytest.fixture
def store() -> Store:
    return MemoryStore(1 << 30)


@pytest.fixture
def open_sessions(engine: Engine) -> Iterator[Callable[..., Sessions]]:
    """Opens the sessions of a store, and closes them after the test."""
    opened: list[Sessions] = []

    def start(store: Store, identity: StateIdentity = IDENTITY, **options: object) -> Sessions:
        sessions = Sessions(engine, store, identity, SessionOptions(**options))  # type: ignore[arg-type]
        opened.append(sessions)
        return sessions

    yield start
    for sessions in opened:
        sessions.close()


@pytest.fixture
def sessions(open_sessions: Callable[..., Sessions], store: Store) -> Sessions:
    return open_sessions(store)
