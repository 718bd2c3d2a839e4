"""Sessions out of a store as files, and back into one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from unspool.sessions.errors import ImportRejected, SessionExists
from unspool.sessions.export import NEUTRAL_OWNER, ExportedTurn, SessionExport, read_export, write_export
from unspool.sessions.head import LogPlace, SessionHead, TakenState
from unspool.sessions.log_digest import LogDigest
from unspool.sessions.options import SessionOptions
from unspool.sessions.records import SessionRecords
from unspool.sessions.results import SessionInfo
from unspool.sessions.state_memory import StateKey
from unspool.sessions.state_tiers import FoundState, StateTiers
from unspool.sessions.turn import Turn
from unspool.sessions.turn_log import TurnLog, turn_key
from unspool.state import SlotSnapshot
from unspool.store import (
    ExpectedState,
    StateIdentity,
    StateProvenance,
    StateRejected,
    Store,
    StoreFull,
    read_state,
    write_state,
)
from unspool.token_bytes import TOKEN_BYTES, unpack_tokens

CHECKED_BYTES = 1 << 18


def export_session(
    log: TurnLog, head: SessionHead, identity: StateIdentity, state: SlotSnapshot | None, key: bytes | None
) -> bytes:
    """A session's file, of its log as it is at the head; turns of sessions that it is a fork of become its own.

    Raises InvalidRequest for a session of too many turns, StoreCorrupt for a damaged log.
    """
    turns, tokens = [], []
    for turn, end in log.back_from(head.place):
        used = end - turn.start
        turns.append(ExportedTurn(used, min(turn.given, used), turn.finish_reason, turn.created))
        tokens.append(turn.tokens[: used * TOKEN_BYTES])
    whole = b"".join(reversed(tokens))
    export = SessionExport(
        session=head.id, identity=identity, created=time.time(), turns=tuple(reversed(turns)), tokens=whole
    )
    if state is not None:
        digest = LogDigest().extend(whole[: state.position * TOKEN_BYTES]).hex()
        provenance = StateProvenance(log_digest=digest, owner=NEUTRAL_OWNER)
        data = bytes(write_state(state, identity, provenance))
        export = replace(export, state_position=state.position, state=data)
    return write_export(export, key)


def newest_state(tiers: StateTiers, head: SessionHead) -> FoundState | None:
    """The state at hand that has consumed the most of the log. Raises StoreUnavailable."""
    for taken in reversed(head.states):
        if found := tiers.find(StateKey(head.owner, taken.digest), taken.position):
            return found
    return None


class Importer:
    """Takes in files that were exported from sessions of the same model."""

    def __init__(self, store: Store, records: SessionRecords, tiers: StateTiers, options: SessionOptions) -> None:
        self._store = store
        self._records = records
        self._tiers = tiers
        self._options = options

    def take_in(self, owner: str, session: str, data: bytes, expected: ExpectedState, vocabulary: int) -> SessionInfo:
        """Makes a session of a file. `expected`: the running model's identity and the tensors of its states.

        Raises ImportRejected, SessionExists, and what the store raises; then there is no such session.
        """
        self._records.require_free(owner, session)
        export = read_export(data, max_bytes=self._options.max_import_bytes, key=self._options.signing_key)
        if different := export.identity.difference(expected.identity):
            verb = "differs" if len(different) == 1 else "differ"
            raise ImportRejected(f"made by another model: {', '.join(different)} {verb}")
        _check_tokens(export.tokens, vocabulary)
        head = SessionHead(id=session, owner=owner, tokenizer=expected.identity.tokenizer)
        turns = _turns(export, head.key)
        if turns:
            head = replace(head, place=LogPlace(turns[-1].id, turns[-1].end, turns[-1].number))
        if export.state:
            head = replace(head, states=(self._keep(head, export, turns, expected),))
        self._write(head, turns)
        return SessionInfo.of(head)

    def _keep(
        self, head: SessionHead, export: SessionExport, turns: Sequence[Turn], expected: ExpectedState
    ) -> TakenState:
        """Checks the file's state and hands it to the tiers as the importer's. A state that no head names is only
        never found."""
        position = export.state_position
        turn = next(turn for turn in turns if turn.start < position + 1 <= turn.end)
        digest = LogDigest().extend(export.tokens[: position * TOKEN_BYTES]).hex()
        try:
            state, _ = read_state(
                export.state, replace(expected, position=position, owner=NEUTRAL_OWNER, log_digest=digest)
            )
        except StateRejected as error:
            raise ImportRejected(f"its state cannot be used: {error}") from error
        self._tiers.keep(StateKey(head.owner, digest), state, None, line=f"{head.owner}/{head.id}")
        return TakenState(position, digest, turn.number)

    def _write(self, head: SessionHead, turns: Sequence[Turn]) -> None:
        """Turns first, then the head: until it is there, nothing of the session is."""
        last: Mapping[str, bytes] = {turn_key(turn.id): turn.encode() for turn in turns[-1:]}
        written = []
        try:
            for turn in turns[:-1]:
                written.append(turn_key(turn.id))
                self._records.put(written[-1], turn.encode())
            self._records.create(head, last)
        except (SessionExists, StoreFull):  # after any other error the head may be there
            for key in [*written, *last]:
                self._store.delete(key)
            raise


def _turns(export: SessionExport, made_by: str) -> list[Turn]:
    """The file's log as turns that nobody else has."""
    turns: list[Turn] = []
    before, start, parent = LogDigest(), 0, None
    for number, turn in enumerate(export.turns, start=1):
        tokens = export.tokens[start * TOKEN_BYTES : (start + turn.num_tokens) * TOKEN_BYTES]
        turns.append(
            Turn(
                parent=parent,
                number=number,
                start=start,
                tokens=tokens,
                given=turn.given,
                before=before,
                made_by=made_by,
                finish_reason=turn.finish_reason,
                created=turn.created,
            )
        )
        before, start, parent = before.extend(tokens), turns[-1].end, turns[-1].id
    return turns


def _check_tokens(tokens: bytes, vocabulary: int) -> None:
    for start in range(0, len(tokens), CHECKED_BYTES):
        piece = unpack_tokens(tokens[start : start + CHECKED_BYTES])
        if min(piece) < 0 or max(piece) >= vocabulary:
            raise ImportRejected(f"holds tokens outside the vocabulary of {vocabulary}")
