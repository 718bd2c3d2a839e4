"""What a store says about its sessions, as JSON values, without a model unless text is asked for. Changes nothing."""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from unspool.errors import UserError
from unspool.loading import load
from unspool.sessions.head import SessionHead
from unspool.sessions.head_scan import scan_heads
from unspool.sessions.records import SessionRecords
from unspool.sessions.stored_states import stored_states
from unspool.sessions.turn import Turn
from unspool.sessions.turn_log import TurnLog
from unspool.store import Store, StoreCorrupt, identity_of
from unspool.token_bytes import TOKEN_BYTES, unpack_tokens

Decode = Callable[[tuple[int, ...]], str]


def list_sessions(store: Store, owner: str | None, limit: int) -> dict[str, Any]:
    """At most `limit` sessions, by owner and id; `more` when there are others, `damaged` for those left out."""
    found = list(itertools.islice(scan_heads(store, owner), limit + 1))
    return {
        "sessions": [_summary(scanned.head) for scanned in found[:limit] if scanned.head is not None],
        "damaged": [scanned.problem for scanned in found[:limit] if scanned.head is None],
        "more": len(found) > limit,
    }


def inspect_session(store: Store, owner: str, session: str, decode: Decode | None = None) -> dict[str, Any]:
    """A session with its turns, and their text if there is a `decode`; its states and where each is stored, its
    snapshots, and the sessions that were forked from it. Turns before a damaged one are left out, and `damaged` says
    why.

    Raises SessionNotFound, StoreCorrupt when the session's own record is damaged, StoreUnavailable.
    """
    head = SessionRecords(store, None).read(owner, session)
    turns, damaged = _turns(store, head, decode)
    stored = stored_states(store, head)
    return _summary(head) | {
        "generation": head.generation,
        "created": head.created,
        "tokenizer": head.tokenizer,
        "damaged": damaged,
        "log": turns,
        "kept_states": [
            {
                "position": state.position,
                "turn": state.number,
                "digest": state.digest,
                "stored": [entry._asdict() for entry in stored[state.digest]],
            }
            for state in head.states
        ],
        "named": [
            {"name": name, "created": snapshot.created} | asdict(snapshot.place)
            for name, snapshot in sorted(head.snapshots.items())
        ],
        "forks": [
            scanned.session
            for scanned in scan_heads(store, owner)
            if scanned.head is not None and scanned.head.forked_from == session
        ],
    }


def turn_decoder(path: str, store: Store, owner: str, session: str) -> Decode:
    """Makes text of a session's tokens. Raises UserError when the model's tokenizer is not the session's."""
    head = SessionRecords(store, None).read(owner, session)
    loaded = load(path)
    identity = identity_of(loaded.path, loaded.model.config, weight_format="", state_dtype=torch.float32)
    if identity.tokenizer != head.tokenizer:
        raise UserError(f"{session} was made with another tokenizer than {path} has; pass its own model")

    def decode(tokens: tuple[int, ...]) -> str:
        text = loaded.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    return decode


def _summary(head: SessionHead) -> dict[str, Any]:
    return {
        "owner": head.owner,
        "session": head.id,
        "tokens": head.place.position,
        "turns": head.place.number,
        "states": len(head.states),
        "snapshots": len(head.snapshots),
        "forked_from": head.forked_from,
        "updated": head.updated,
    }


def _turns(store: Store, head: SessionHead, decode: Decode | None) -> tuple[list[dict[str, Any]], str | None]:
    """Rows of the log's turns, the first first, and what kept it from being read to its beginning."""
    rows, damaged = [], None
    try:
        for turn, end in TurnLog(store).back_from(head.place):
            rows.append(_row(turn, end, decode))
    except StoreCorrupt as error:
        damaged = str(error)
    return rows[::-1], damaged


def _row(turn: Turn, end: int, decode: Decode | None) -> dict[str, Any]:
    used = end - turn.start
    given = min(turn.given, used)
    row = {
        "turn": turn.number,
        "id": turn.id,
        "start": turn.start,
        "end": end,
        "given": given,
        "generated": used - given,
        "finish_reason": turn.finish_reason,
        "created": turn.created,
    }
    return row if decode is None else row | {"text": decode(unpack_tokens(turn.tokens[: used * TOKEN_BYTES]))}
