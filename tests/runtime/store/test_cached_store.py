"""A directory in front of a real shared store: what is near is read there, and the shared store decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from unspool.errors import UserError
from unspool.store import StoreUnavailable, open_store
from unspool.store.cached import CachedStore
from unspool.store.local import LocalStore
from unspool.store.redis_store import RedisStore

if TYPE_CHECKING:
    from store_servers import RedisServer

STATE = b"x" * 100_000
DIRECTORY_BYTES = 350_000


@pytest.fixture
def server(own_redis_server: Callable[..., RedisServer]) -> RedisServer:
    return own_redis_server()


@pytest.fixture
def near(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "near", DIRECTORY_BYTES, fsync=False)


@pytest.fixture
def store(server: RedisServer, near: LocalStore) -> Iterator[CachedStore]:
    store = CachedStore(near, RedisStore(server.url, "test", 1 << 26))
    yield store
    store.close()


def test_states_are_read_near(store: CachedStore, server: RedisServer, near: LocalStore) -> None:
    store.put("states/a", STATE)
    store.put("turns/t", b"turn")
    server.kill()
    assert store.get("states/a") == STATE
    with pytest.raises(StoreUnavailable):
        store.get("turns/t")
    with pytest.raises(StoreUnavailable):
        store.get("states/b")


def test_what_another_process_stored_is_copied_when_it_is_read(
    store: CachedStore, server: RedisServer, near: LocalStore
) -> None:
    other = RedisStore(server.url, "test", 1 << 26)
    other.put("states/a", STATE)
    assert near.get("states/a") is None
    assert store.get("states/a") == near.get("states/a") == STATE
    store.delete("states/a")
    assert near.get("states/a") is None and other.get("states/a") is None
    other.close()


def test_the_oldest_copies_make_room(store: CachedStore, near: LocalStore) -> None:
    for number in range(6):
        store.put(f"states/{number}", STATE)
    assert [entry.key for entry in near.list("states/")] == ["states/3", "states/4", "states/5"]
    assert all(store.get(f"states/{number}") == STATE for number in range(6))
    store.put("states/huge", STATE * 4)
    assert store.get("states/huge") == STATE * 4 and near.get("states/huge") is None


def test_a_copy_that_is_damaged_is_read_from_the_shared_store(
    store: CachedStore, near: LocalStore, tmp_path: Path
) -> None:
    store.put("states/a", STATE)
    for blob in (tmp_path / "near").rglob("*"):
        if blob.is_file() and blob.stat().st_size == len(STATE):
            blob.unlink()
    assert store.get("states/a") == STATE
    assert near.get("states/a") == STATE


def test_a_directory_needs_a_shared_store_behind_it(tmp_path: Path, server: RedisServer) -> None:
    opened = open_store(server.url, max_bytes=1 << 26, cache_directory=tmp_path / "c", cache_bytes=1 << 20)
    assert isinstance(opened, CachedStore)
    opened.close()
    with pytest.raises(UserError, match="cache_directory: only a shared store"):
        open_store(str(tmp_path / "d"), max_bytes=1 << 20, cache_directory=tmp_path / "c", cache_bytes=1 << 20)
