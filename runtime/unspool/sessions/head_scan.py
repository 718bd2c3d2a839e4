"""Every session of a store, of all owners and models, damaged ones too: for what looks after the store as a whole."""

from collections.abc import Iterator
from typing import NamedTuple

from unspool.sessions.head import SessionHead, check_name
from unspool.store import Store, StoreCorrupt

PREFIX = "sessions/"


class ScannedHead(NamedTuple):
    key: str
    owner: str
    session: str
    version: int
    written: float
    """When the session last changed, in seconds since 1970 (UTC)."""
    head: SessionHead | None
    """None when its record is damaged."""
    problem: str = ""


def scan_heads(store: Store, owner: str | None = None) -> Iterator[ScannedHead]:
    """By owner and id; those of one owner if it is named. What is created or deleted meanwhile may or may not appear.

    Raises InvalidRequest for a malformed owner, and StoreUnavailable.
    """
    if owner is not None:
        check_name("owner", owner)
    for entry in store.list(PREFIX if owner is None else f"{PREFIX}{owner}/"):
        whose, _, session = entry.key.removeprefix(PREFIX).partition("/")
        found = store.read_head(entry.key)
        if found is None:
            continue
        head, problem = None, ""
        try:
            head = SessionHead.decode(entry.key, found.value)
        except StoreCorrupt as error:
            problem = str(error)
        yield ScannedHead(entry.key, whose, session, found.version, entry.created, head, problem)
