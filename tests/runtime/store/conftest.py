"""Every kind of store, empty and on real servers."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_servers import (
    S3Server,
    credentials,
    own_redis_server,
    own_s3_server,
    redis_binary,
    redis_server,
    s3_server,
)

from unspool.store import Store
from unspool.store.local import LocalStore
from unspool.store.memory import MemoryStore
from unspool.store.redis_store import RedisStore
from unspool.store.s3_store import S3Store

__all__ = ["credentials", "own_redis_server", "own_s3_server", "redis_binary", "redis_server", "s3_server"]

OpenStore = Callable[[int], Store]
"""Opens a new, empty store that may hold so many bytes."""


@pytest.fixture(params=["memory", "local", "redis", "s3"])
def open_empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    opened: list[Store] = []
    numbers = itertools.count()

    def open_new(max_bytes: int) -> Store:
        name = f"{tmp_path.name}-{next(numbers)}"
        store: Store
        match request.param:
            case "memory":
                store = MemoryStore(max_bytes)
            case "local":
                store = LocalStore(tmp_path / name, max_bytes, fsync=False)
            case "redis":
                store = RedisStore(request.getfixturevalue("redis_server").url, name, max_bytes)
            case _:
                server: S3Server = request.getfixturevalue("s3_server")
                store = S3Store(server.bucket, name, max_bytes, endpoint_url=server.url)
        opened.append(store)
        return store

    yield open_new
    for store in opened:
        store.close()
