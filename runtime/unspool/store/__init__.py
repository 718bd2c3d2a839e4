"""States as files, and the stores that keep them, heads and turns outside the engine."""

from unspool.store.identity import StateIdentity, identity_of
from unspool.store.interface import (
    Entry,
    Head,
    InvalidKey,
    Store,
    StoreCorrupt,
    StoreFull,
    StoreUnavailable,
)
from unspool.store.opening import open_store
from unspool.store.state_file import ExpectedState, StateProvenance, read_state, write_state
from unspool.store.state_layout import StateRejected

__all__ = [
    "Entry",
    "ExpectedState",
    "Head",
    "InvalidKey",
    "StateIdentity",
    "StateProvenance",
    "StateRejected",
    "Store",
    "StoreCorrupt",
    "StoreFull",
    "StoreUnavailable",
    "identity_of",
    "open_store",
    "read_state",
    "write_state",
]
