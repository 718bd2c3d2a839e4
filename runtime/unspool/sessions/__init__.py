"""Sessions: owned, append-only token logs whose states are a cache. A turn is committed whole or not at all."""

from unspool.sessions.collection import Collection, collect
from unspool.sessions.default_store import DEFAULT_OWNER, DEFAULT_STORE_BYTES, default_store
from unspool.sessions.errors import (
    ImportRejected,
    SessionBusy,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionMismatch,
    SessionNotFound,
    TurnFailed,
)
from unspool.sessions.options import SessionOptions
from unspool.sessions.results import Place, Rollback, SessionInfo, TurnRequest, TurnResult
from unspool.sessions.sessions import Sessions
from unspool.sessions.signing_key import read_signing_key
from unspool.sessions.turn_runner import RunningTurn
from unspool.sessions.verification import Verification, verify

__all__ = [
    "DEFAULT_OWNER",
    "DEFAULT_STORE_BYTES",
    "Collection",
    "ImportRejected",
    "Place",
    "Rollback",
    "RunningTurn",
    "SessionBusy",
    "SessionConflict",
    "SessionError",
    "SessionExists",
    "SessionInfo",
    "SessionMismatch",
    "SessionNotFound",
    "SessionOptions",
    "Sessions",
    "TurnFailed",
    "TurnRequest",
    "TurnResult",
    "Verification",
    "collect",
    "default_store",
    "read_signing_key",
    "verify",
]
