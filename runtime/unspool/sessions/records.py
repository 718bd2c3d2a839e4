"""Heads of sessions in a store, each under its owner."""

from collections.abc import Callable, Iterator, Mapping

from unspool.sessions.errors import SessionConflict, SessionExists, SessionMismatch, SessionNotFound
from unspool.sessions.head import SessionHead, check_name
from unspool.sessions.room import with_room
from unspool.store import Store, StoreUnavailable

MAX_ATTEMPTS = 16
NOT_FOUND = "there is no such session; list yours to see what there is"


class SessionRecords:
    """Reads and changes heads. A change is made to what is there at that moment, and wholly or not at all."""

    def __init__(self, store: Store, tokenizer: str | None, make_room: Callable[[], bool] = lambda: False) -> None:
        """`tokenizer` is the fingerprint of the one that gives tokens their meaning here; None reads those of any.
        `make_room` gives up something that the store can do without, and says whether there was anything."""
        self._store = store
        self._tokenizer = tokenizer
        self._make_room = make_room

    def create(self, head: SessionHead, objects: Mapping[str, bytes] | None = None) -> None:
        """Raises SessionExists, and what the store raises."""
        if not self._write(head, None, objects):
            raise _is_taken(head.id)

    def require_free(self, owner: str, session: str) -> None:
        """Raises SessionExists. Only `create` can say for sure, and only when it is called."""
        if self._store.read_head(_key(owner, session)) is not None:
            raise _is_taken(session)

    def read(self, owner: str, session: str) -> SessionHead:
        """Raises SessionNotFound for another owner's too, SessionMismatch when its tokens are another tokenizer's."""
        return self._read(owner, session)[0]

    def change(
        self,
        owner: str,
        session: str,
        change: Callable[[SessionHead], SessionHead],
        objects: Mapping[str, bytes] | None = None,
    ) -> SessionHead:
        """Replaces a head by what `change` makes of it, which may be called several times and may raise.

        Raises StoreUnavailable when it is not known whether the change was made.
        """
        for _ in range(MAX_ATTEMPTS):
            head, version = self._read(owner, session)
            changed = change(head)
            if changed == head:
                return head
            if self._write(changed, version, objects):
                return changed
        raise SessionConflict(head.generation, self.read(owner, session).generation)

    def delete(self, owner: str, session: str) -> SessionHead:
        """Returns the last head."""
        for _ in range(MAX_ATTEMPTS):
            head, version = self._read(owner, session, any_tokenizer=True)
            if self._store.swap_head(_key(owner, session), version, None) is not None:
                return head
        raise SessionConflict(head.generation, self.read(owner, session).generation)

    def list(self, owner: str, after: str = "") -> Iterator[SessionHead]:
        """An owner's sessions by id, those after `after`, of whatever tokenizer."""
        check_name("owner", owner)
        for entry in self._store.list(f"sessions/{owner}/"):
            name = entry.key.rpartition("/")[2]
            if name > after and (head := self._store.read_head(entry.key)) is not None:
                yield SessionHead.decode(entry.key, head.value)

    def put(self, key: str, value: bytes) -> None:
        """Stores a turn that a head will name; states have to go when the store is full."""
        with_room(lambda: self._store.put(key, value), self._make_room)

    def _read(self, owner: str, session: str, *, any_tokenizer: bool = False) -> tuple[SessionHead, int]:
        key = _key(owner, session)
        found = self._store.read_head(key)
        if found is None:
            raise SessionNotFound(NOT_FOUND)
        head = SessionHead.decode(key, found.value)
        if self._tokenizer not in (None, head.tokenizer) and not any_tokenizer:
            raise SessionMismatch(
                "the session was made with another tokenizer; serve its own model, or start a new one"
            )
        return head, found.version

    def _write(self, head: SessionHead, version: int | None, objects: Mapping[str, bytes] | None) -> bool:
        """Whether the head was written, and not another's before it. Logs come before states: those have to go when
        the store is full. After a failure that may have come too late, what is there decides."""
        key, value = _key(head.owner, head.id), head.encode()
        try:
            written = with_room(lambda: self._store.swap_head(key, version, value, objects), self._make_room)
        except StoreUnavailable:
            found = self._store.read_head(key)
            if found is not None and found.value == value:
                return True
            raise
        return written is not None


def _is_taken(session: str) -> SessionExists:
    return SessionExists(f"{session}: you have a session of that id; choose another")


def _key(owner: str, session: str) -> str:
    check_name("owner", owner)
    check_name("session", session)
    return f"sessions/{owner}/{session}"
