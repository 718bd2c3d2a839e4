"""A store on a Redis server (or one that speaks its protocol, such as Valkey), shared by replicas.

It keeps what the server keeps: for sessions to outlive the server, let it write its append-only file at every commit
(`appendonly yes`, `appendfsync always`), and let it evict nothing.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from unspool.errors import UserError
from unspool.store.interface import (
    SMALL_BYTES,
    Buffer,
    Entry,
    Head,
    InvalidKey,
    StoreCorrupt,
    StoreFull,
    StoreUnavailable,
    byte_view,
    bytes_allowed,
    check_cap,
    check_key,
    check_lease,
    check_prefix,
    check_swap,
    names_head,
    names_object,
    no_room,
)
from unspool.store.redis_scripts import DELETE, LEASE, PUT, RELEASE, SWAP

PART_BYTES = 4 << 20
"""A longer value is in parts of so many bytes, so that no command holds the server up for long."""
PART_SECONDS = 3600
"""Parts that no value has come to own vanish after this time: their writer died."""
TIMEOUT_SECONDS = 5.0
PAGE_ENTRIES = 512

ENTRY_FIELDS = ("value", "size", "parts", "name", "version")


class RedisStore:
    """All keys begin with `{prefix}`, whose braces keep them on one node of a cluster. `max_bytes` bounds all values
    under the prefix, whichever replica wrote them."""

    def __init__(self, url: str, prefix: str, max_bytes: int) -> None:
        """Raises UserError for a URL that is none; the server need not be there yet."""
        check_cap(max_bytes)
        check_key(prefix)
        self.max_bytes = max_bytes
        self._root = f"{{{prefix}}}:"
        try:
            # Nothing is sent twice: a swap that was done, but whose answer was lost, would be taken for a lost race.
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise UserError(
                "the store's URL is none; write redis://HOST:PORT/DATABASE, or rediss:// for TLS"
            ) from error
        register = self._client.register_script
        self._put, self._swap = register(PUT), register(SWAP)
        self._delete = register(DELETE)
        self._lease, self._release = register(LEASE), register(RELEASE)

    def get(self, key: str) -> bytes | None:
        check_key(key)
        while True:
            value, size, parts, name, version = self._entry(key)
            if size is None or version is not None:
                return None
            if parts is None:
                return bytes(value)
            whole = self._read(self._parts(name.decode(), int(parts)))
            if len(whole) == int(size):
                return whole
            if self._entry(key)[3] == name:  # else it was deleted, and perhaps written again, since
                raise StoreCorrupt(f"{key}: {len(whole)} of {int(size)} bytes are left on the server; delete the key")

    def put(self, key: str, value: Buffer) -> None:
        check_key(key)
        view = byte_view(value)
        _, size, _, _, version = self._entry(key)
        if version is not None:
            raise names_head(key)
        if size is not None:
            return
        if view.nbytes <= PART_BYTES:
            self._put_entry(key, view, [], bytes(view))
            return
        name = secrets.token_hex(16)
        parts = self._parts(name, -(-view.nbytes // PART_BYTES))
        self._check_room(view.nbytes)  # before the work; the script checks again
        with self._failing():
            for index, part in enumerate(parts):
                piece = bytes(view[index * PART_BYTES : (index + 1) * PART_BYTES])
                self._client.set(part, piece, ex=PART_SECONDS)
        try:
            kept = self._put_entry(key, view, parts, name.encode())
        except (StoreFull, InvalidKey):
            self._discard(parts)
            raise
        if not kept:
            self._discard(parts)

    def delete(self, key: str) -> None:
        check_key(key)
        deleted = False
        while not deleted:  # another may have deleted it, and written it again, since its parts' name was read
            _, _, parts, name, _ = self._entry(key)
            owned = self._parts(name.decode(), int(parts)) if parts is not None else []
            with self._failing():
                keys = [*self._common_keys(key), self._root + "lease:" + key, *owned]
                deleted = bool(self._delete(keys=keys, args=[key, name or b""]))

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        return self._entries(prefix)

    def read_head(self, key: str) -> Head | None:
        check_key(key)
        value, _, _, _, version = self._entry(key)
        return Head(bytes(value), int(version)) if version is not None else None

    def swap_head(
        self, key: str, expected: int | None, value: bytes | None, objects: Mapping[str, Buffer] | None = None
    ) -> int | None:
        views = check_swap(key, value, objects)
        for name, view in views.items():
            if view.nbytes > SMALL_BYTES:
                self.put(name, view)
        small = {name: bytes(view) for name, view in views.items() if view.nbytes <= SMALL_BYTES}
        keys = [*self._common_keys(key), self._root + "version", *map(self._entry_key, small)]
        arguments = [key, "" if expected is None else expected, self.max_bytes, "" if value is None else "1"]
        with self._failing():
            answer = self._swap(
                keys=keys, args=[*arguments, value or b"", *(part for item in small.items() for part in item)]
            )
        if answer == b"object":
            raise names_object(key)
        if answer == b"full":
            raise no_room(max([len(value or b""), *map(len, small.values())]), self.max_bytes)
        if isinstance(answer, list):
            raise names_head(answer[1].decode())
        return int(answer) or None

    def lease(self, key: str, holder: str, seconds: float) -> int | None:
        check_lease(key, holder, seconds)
        with self._failing():
            epoch = self._lease(keys=[self._root + "lease:" + key], args=[holder, int(seconds * 1e6)])
        return int(epoch) or None

    def release(self, key: str, holder: str) -> None:
        check_key(key)
        with self._failing():
            self._release(keys=[self._root + "lease:" + key], args=[holder])

    def close(self) -> None:
        self._client.close()

    def _entry(self, key: str) -> Sequence[Any]:
        """The ENTRY_FIELDS, None where there is none."""
        with self._failing():
            values: Sequence[Any] = self._client.hmget(self._entry_key(key), ENTRY_FIELDS)
        return values

    def _put_entry(self, key: str, view: memoryview, parts: Sequence[str], content: bytes) -> bool:
        """False when another has written the key since."""
        allowed = bytes_allowed(view.nbytes, self.max_bytes)
        with self._failing():
            answer = self._put(
                keys=[*self._common_keys(key), *parts],
                args=[key, view.nbytes, allowed, content],
            )
        if answer == b"head":
            raise names_head(key)
        if answer == b"full":
            raise no_room(view.nbytes, self.max_bytes)
        if answer == b"expired":
            raise StoreUnavailable(f"{key}: writing it took longer than {PART_SECONDS} s")
        return bool(answer)

    def _check_room(self, num_bytes: int) -> None:
        with self._failing():
            used = int(self._client.get(self._root + "used") or 0)
        if used + num_bytes > bytes_allowed(num_bytes, self.max_bytes):
            raise no_room(num_bytes, self.max_bytes)

    def _read(self, parts: Sequence[str]) -> bytes:
        whole = bytearray()
        for part in parts:
            with self._failing():
                whole += self._client.get(part) or b""
        return bytes(whole)

    def _discard(self, parts: Sequence[str]) -> None:
        """Removes parts that no value owns now rather than in time, if the server is there."""
        with contextlib.suppress(redis.RedisError):
            self._client.unlink(*parts)

    def _entries(self, prefix: str) -> Iterator[Entry]:
        start, end = f"[{prefix}", f"({prefix}\x7f"  # which comes after every character of a key
        while True:
            with self._failing():
                index = self._root + "index"
                keys = self._client.zrangebylex(index, start, end, start=0, num=PAGE_ENTRIES)
                pipeline = self._client.pipeline(transaction=False)
                for key in keys:
                    pipeline.hmget(self._entry_key(key.decode()), "size", "created")
                found = pipeline.execute()
            for key, (size, created) in zip(keys, found, strict=True):
                if size is not None:
                    yield Entry(key.decode(), int(size), float(created))
            if len(keys) < PAGE_ENTRIES:
                return
            start = f"({keys[-1].decode()}"

    def _common_keys(self, key: str) -> tuple[str, ...]:
        return self._entry_key(key), self._root + "index", self._root + "used"

    def _entry_key(self, key: str) -> str:
        return self._root + "entry:" + key

    def _parts(self, name: str, count: int) -> Sequence[str]:
        return [f"{self._root}part:{name}:{index}" for index in range(count)]

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Gives the client's errors their types. Its messages are not passed on: they may hold the URL's password."""
        try:
            yield
        except redis.exceptions.AuthenticationError as error:
            raise UserError("the Redis server refuses the URL's user or password; correct the URL") from error
        except redis.RedisError as error:
            if "used memory > 'maxmemory'" in str(error):  # whose type depends on the server and on where it happened
                raise StoreFull("the Redis server has reached its maxmemory; raise it, or delete sessions") from error
            raise StoreUnavailable(f"the Redis server does not answer as it should ({type(error).__name__})") from error
