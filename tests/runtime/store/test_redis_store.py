"""The Redis store against a real server: killed and restarted, out of memory, locked, and damaged."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from unspool.errors import UserError
from unspool.store import StoreCorrupt, StoreFull, StoreUnavailable, redis_store
from unspool.store.redis_store import PART_BYTES, RedisStore

PLENTY = 1 << 30
STATE = bytes(range(256)) * (3 * PART_BYTES // 256) + b"and a little more"
StartServer = Callable[..., Any]


@pytest.fixture
def client(redis_server: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
def store(redis_server: Any, tmp_path: Any) -> Iterator[RedisStore]:
    store = RedisStore(redis_server.url, tmp_path.name, PLENTY)
    yield store
    store.close()


def keys_of(client: redis.Redis, store: RedisStore, kind: str) -> list[bytes]:
    return sorted(client.scan_iter(match=f"{store._root}{kind}*"))


def test_a_killed_server_loses_nothing_that_was_written(own_redis_server: StartServer) -> None:
    server = own_redis_server()
    store = RedisStore(server.url, "test", PLENTY)
    store.put("state", STATE)
    version = store.swap_head("head", None, b"1", {"turn": b"t"})
    assert store.lease("session", "me", 600.0) == 1
    server.kill()
    calls: list[Callable[[], object]] = [
        lambda: store.get("state"),
        lambda: store.put("new", b"n"),
        lambda: store.put("large", STATE),
        lambda: store.delete("turn"),
        lambda: [*store.list("")],
        lambda: store.read_head("head"),
        lambda: store.swap_head("head", version, b"2"),
        lambda: store.lease("session", "me", 1.0),
        lambda: store.release("session", "me"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="does not answer"):
            call()
    server.start()
    assert store.get("state") == STATE
    assert store.read_head("head") == (b"1", version)
    assert store.get("turn") == b"t"
    assert store.lease("session", "another", 1.0) is None
    second = store.swap_head("head", version, b"2")
    assert second is not None and version is not None and second > version
    store.close()


def test_a_server_killed_amid_a_large_value_has_none_of_it(
    own_redis_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts were written, its entry was not: the value is absent, and the parts vanish in time."""
    server = own_redis_server()
    store = RedisStore(server.url, "test", PLENTY)
    store.swap_head("head", None, b"1")
    commit = store._put

    def kill_first(*arguments: Any, **named: Any) -> Any:
        server.kill()
        return commit(*arguments, **named)

    monkeypatch.setattr(store, "_put", kill_first)
    with pytest.raises(StoreUnavailable):
        store.put("state", STATE)
    monkeypatch.undo()
    server.start()
    assert store.get("state") is None and [entry.key for entry in store.list("")] == ["head"]
    with redis.Redis.from_url(server.url) as client:
        parts = keys_of(client, store, "part")
        assert len(parts) == 4 and all(0 < client.ttl(part) <= redis_store.PART_SECONDS for part in parts)
    store.put("state", STATE)
    assert store.get("state") == STATE
    store.close()


def test_a_stopped_server_is_given_up_on(own_redis_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "TIMEOUT_SECONDS", 0.2)
    server = own_redis_server()
    store = RedisStore(server.url, "test", PLENTY)
    version = store.swap_head("head", None, b"1")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable, match="TimeoutError"):
            store.swap_head("head", version, b"2")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    head = store.read_head("head")  # the swap may have been done or not, as its error says
    assert head is not None and head.value in (b"1", b"2")
    store.close()


class Proxy:
    """Passes on what is sent to the server, and its answers until it is told to lose them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.lose_answers = False
        self.lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # when it is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with server, client, contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self.lose_answers:
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    def close(self) -> None:
        self._listener.close()


def test_a_swap_whose_answer_was_lost_is_not_taken_for_a_lost_race(redis_server: Any) -> None:
    """Were it repeated, it would find its own value there and say that another came first."""
    proxy = Proxy(redis_server.port)
    store = RedisStore(proxy.url, "lost-answers", PLENTY)
    version = store.swap_head("head", None, b"1")
    proxy.lose_answers = True
    with pytest.raises(StoreUnavailable, match="ConnectionError"):
        store.swap_head("head", version, b"2")
    proxy.lose_answers = False
    assert proxy.lost == 1, "sent once"
    head = store.read_head("head")
    assert head is not None and head.value == b"2", "the server had done it"
    store.close()
    proxy.close()


def test_parts_come_and_go_with_their_value(store: RedisStore, client: redis.Redis) -> None:
    store.put("state", STATE)
    parts = keys_of(client, store, "part")
    assert [client.strlen(part) for part in parts] == [PART_BYTES] * 3 + [17]
    assert all(client.ttl(part) == -1 for part in parts), "owned parts do not expire"
    store.put("state", STATE)
    assert keys_of(client, store, "part") == parts
    store.delete("state")
    assert keys_of(client, store, "part") == [] and client.get(store._root + "used") == b"0"


def test_a_refused_value_leaves_no_parts(
    redis_server: Any, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the work, and again at the end when another has filled the store meanwhile."""
    store = RedisStore(redis_server.url, "refused", 2 * len(STATE))
    store.put("first", STATE)
    with pytest.raises(StoreFull):
        store.put("second", STATE)
    monkeypatch.setattr(store, "_check_room", lambda num_bytes: None)
    with pytest.raises(StoreFull):
        store.put("second", STATE)
    assert len(keys_of(client, store, "part")) == 4
    assert store.get("second") is None
    store.close()


def test_a_lost_part_is_named(store: RedisStore, client: redis.Redis) -> None:
    store.put("state", STATE)
    client.delete(keys_of(client, store, "part")[1])
    with pytest.raises(StoreCorrupt, match=f"state: {len(STATE) - PART_BYTES} of {len(STATE)} bytes are left"):
        store.get("state")
    store.delete("state")
    assert store.get("state") is None


def test_a_server_out_of_memory_is_full(own_redis_server: StartServer) -> None:
    server = own_redis_server("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    store = RedisStore(server.url, "test", PLENTY)
    store.put("turn", b"t")
    with pytest.raises(StoreFull, match="maxmemory"):
        for number in range(100):
            store.put(f"state/{number}", bytes(1 << 20))
    assert store.get("turn") == b"t" and store.get(f"state/{number}") is None
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "2mb")  # far too full
        for deleted in range(number):
            store.delete(f"state/{deleted}")
        client.config_set("maxmemory", "8mb")
        assert client.get(store._root + "used") == b"1"
    store.put("state/0", bytes(1 << 20))
    store.close()


def test_a_password_is_asked_for_and_never_shown(own_redis_server: StartServer) -> None:
    server = own_redis_server()
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "right")
    for password in ("", ":secret@"):
        store = RedisStore(server.url.replace("redis://", f"redis://{password}"), "test", PLENTY)
        with pytest.raises(UserError, match="user or password") as raised:
            store.get("key")
        assert "secret" not in str(raised.value)
        store.close()
    store = RedisStore(server.url.replace("redis://", "redis://:right@"), "test", PLENTY)
    assert store.get("key") is None
    store.close()


def test_prefixes_keep_stores_apart(redis_server: Any) -> None:
    first, second = (RedisStore(redis_server.url, name, PLENTY) for name in ("apart-1", "apart-2"))
    first.put("key", b"1")
    assert second.get("key") is None and [*second.list("")] == []
    second.put("key", b"2")
    assert first.get("key") == b"1"
    for store in (first, second):
        store.close()


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(UserError, match="write redis://HOST:PORT"):
        RedisStore("redis:/nonsense:x", "test", PLENTY)
