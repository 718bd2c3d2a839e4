"""Sessions as files: out of one server, into another, and nothing else in."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unspool.errors import UserError
from unspool.requests import InvalidRequest, SamplingParams
from unspool.sessions import (
    ImportRejected,
    Place,
    SessionExists,
    SessionNotFound,
    SessionOptions,
    Sessions,
    TurnRequest,
    read_signing_key,
)
from unspool.sessions.export import (
    MAX_HEADER_BYTES,
    MAX_TURNS,
    NEUTRAL_OWNER,
    ExportedTurn,
    SessionExport,
    read_export,
    write_export,
)
from unspool.sessions.state_memory import StateKey
from unspool.store import StateIdentity, StateProvenance, Store, StoreFull, write_state
from unspool.store.memory import MemoryStore
from unspool.token_bytes import pack_tokens, unpack_tokens

Open = Callable[..., Sessions]

GREEDY = SamplingParams(temperature=0.0)
KEY = b"k" * 32
MAX_BYTES = 1 << 20
HEADER_START = 16


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def turn(tokens: tuple[int, ...] = (), max_tokens: int = 8) -> TurnRequest:
    return TurnRequest(tokens=tokens, max_tokens=max_tokens, sampling=GREEDY)


def spoken(sessions: Sessions, session: str = "s") -> bytes:
    """A session of three turns, exported."""
    sessions.create("me", session)
    sessions.generate("me", session, turn(text(20)))
    sessions.append("me", session, text(5, 1))
    sessions.generate("me", session, turn(text(3, 2), 4))
    return sessions.export("me", session)


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<I", data, 12)
    header: dict[str, Any] = json.loads(data[HEADER_START : HEADER_START + length])
    return header


def sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def forged(data: bytes, **fields: Any) -> bytes:
    """The file with other values in its header, and a digest to match: what anybody can make of an unsigned one."""
    (length,) = struct.unpack_from("<I", data, 12)
    values = header_of(data) | fields
    header = json.dumps({name: value for name, value in values.items() if value is not ...}).encode()
    return sealed(data[:12] + struct.pack("<I", len(header)) + header + data[HEADER_START + length : -32])


def turns_of(sessions: Sessions, owner: str, session: str) -> list[tuple[object, ...]]:
    place = sessions.records.read(owner, session).place
    return [
        (turn.number, turn.start, end, turn.given, turn.finish_reason, turn.created)
        for turn, end in sessions.log.back_from(place)
    ]


@pytest.fixture
def elsewhere(open_sessions: Open) -> Sessions:
    """Another server of the same model."""
    return open_sessions(MemoryStore(1 << 30))


@pytest.fixture
def data(sessions: Sessions) -> bytes:
    return spoken(sessions)


def stored(sessions: Sessions) -> list[str]:
    sessions.flush()
    return [entry.key for entry in sessions.store.list("")]


def test_a_session_goes_on_elsewhere_as_if_it_had_never_left(sessions: Sessions, elsewhere: Sessions) -> None:
    data = spoken(sessions)
    info = elsewhere.import_session("you", data, "copy")
    assert (info.id, info.generation, info.position, info.turns) == ("copy", 0, 40, 3)
    assert elsewhere.tokens("you", "copy") == sessions.tokens("me", "s")
    assert turns_of(elsewhere, "you", "copy") == turns_of(sessions, "me", "s")
    there = elsewhere.generate("you", "copy", turn(text(4, 3)))
    here = sessions.generate("me", "s", turn(text(4, 3)))
    assert there.tokens == here.tokens
    assert (there.replayed_tokens, there.generation) == (1, 1)


def test_the_state_is_the_importers_and_outlives_a_restart(sessions: Sessions, open_sessions: Open) -> None:
    store = MemoryStore(1 << 30)
    first = open_sessions(store)
    first.import_session("you", spoken(sessions), "copy")
    first.close()
    again = open_sessions(store)
    result = again.generate("you", "copy", turn(text(4, 3)))
    assert (result.state_source, result.replayed_tokens) == ("store", 1)
    assert again.statistics().rejected == 0


def test_a_file_does_not_tell_whose_it_was(sessions: Sessions) -> None:
    sessions.create("a-private-owner", "s")
    sessions.append("a-private-owner", "s", text(20))
    assert b"a-private-owner" not in sessions.export("a-private-owner", "s")


def test_without_a_state_the_log_is_enough(sessions: Sessions, elsewhere: Sessions, store: Store) -> None:
    spoken(sessions)
    sessions.tiers.drop_memory()
    for entry in list(store.list("states/")):
        store.delete(entry.key)
    data = sessions.export("me", "s")
    assert header_of(data)["state_bytes"] == 0
    elsewhere.import_session("you", data, "copy")
    assert elsewhere.generate("you", "copy", turn()).replayed_tokens == 40


def test_an_empty_session_can_travel_too(sessions: Sessions, elsewhere: Sessions) -> None:
    sessions.create("me", "s")
    info = elsewhere.import_session("you", sessions.export("me", "s"))
    assert (info.position, info.turns) == (0, 0)
    assert info.id.startswith("sess_")


def test_a_fork_from_the_middle_of_a_turn_takes_what_it_has(sessions: Sessions, elsewhere: Sessions) -> None:
    spoken(sessions)
    sessions.fork("me", "s", Place(position=10), new="fork")  # half of the first turn's given tokens
    sessions.generate("me", "fork", turn(text(2, 5), 3))
    info = elsewhere.import_session("you", sessions.export("me", "fork"), "fork")
    assert (info.position, info.turns) == (15, 2)
    assert elsewhere.tokens("you", "fork") == sessions.tokens("me", "fork")
    first = turns_of(elsewhere, "you", "fork")[-1]
    assert first[:4] == (1, 0, 10, 10)
    assert elsewhere.generate("you", "fork", turn()).tokens == sessions.generate("me", "fork", turn()).tokens


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.integers(1, 9), max_size=5), back=st.integers(0, 20), taken=st.integers(0, 3))
def test_whatever_a_log_is_made_of_it_arrives(
    sessions: Sessions, elsewhere: Sessions, lengths: list[int], back: int, taken: int
) -> None:
    name = sessions.create("me").id
    for length in lengths:
        sessions.generate("me", name, turn(text(length, length), taken) if taken else turn(text(length, length), 0))
    position = max(sessions.info("me", name).position - back, 0)
    sessions.rollback("me", name, Place(position=position))
    copy = elsewhere.import_session("you", sessions.export("me", name))
    assert elsewhere.tokens("you", copy.id) == sessions.tokens("me", name)
    assert turns_of(elsewhere, "you", copy.id) == [
        (number, start, end, min(given, end - start), reason, created)
        for number, start, end, given, reason, created in turns_of(sessions, "me", name)
    ]
    again = elsewhere.export("you", copy.id)
    assert read_export(again, max_bytes=MAX_BYTES, key=None).turns == tuple(
        ExportedTurn(end - start, min(given, end - start), reason, created)  # type: ignore[operator,type-var,arg-type]
        for _, start, end, given, reason, created in reversed(turns_of(sessions, "me", name))
    )


def test_others_sessions_cannot_be_exported(sessions: Sessions, data: bytes) -> None:
    with pytest.raises(SessionNotFound):
        sessions.export("you", "s")


def test_no_byte_of_the_file_can_be_changed(data: bytes) -> None:
    """Every byte of the header, the turns, the tokens and the digest; of the state one in seven."""
    state_start = len(data) - 32 - header_of(data)["state_bytes"]
    places = [*range(state_start), *range(state_start, len(data) - 32, 7), *range(len(data) - 32, len(data))]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(ImportRejected):
            read_export(bytes(changed), max_bytes=MAX_BYTES, key=None)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), signed=st.booleans())
def test_no_byte_can_be_changed_in_any_way(data: bytes, where: float, mask: int, signed: bool) -> None:
    export = read_export(data, max_bytes=MAX_BYTES, key=None)
    changed = bytearray(write_export(export, KEY if signed else None))
    changed[int(where * len(changed))] ^= mask
    for key in (None, KEY):
        with pytest.raises(ImportRejected):
            read_export(bytes(changed), max_bytes=MAX_BYTES, key=key)


def test_no_byte_can_be_missing_or_added(data: bytes) -> None:
    for end in [*range(600), *range(600, len(data), 101), len(data) - 1]:
        with pytest.raises(ImportRejected):
            read_export(data[:end], max_bytes=MAX_BYTES, key=None)
    for longer in (data + b"\0", data + data, b"\0" + data, sealed(data), sealed(data[:-32] + b"\0")):
        with pytest.raises(ImportRejected):
            read_export(longer, max_bytes=MAX_BYTES, key=None)


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10 << 20))
    return file.getvalue() + data


@pytest.mark.parametrize(
    "make",
    [
        lambda _: b"",
        lambda data: data[:8],
        lambda data: gzip.compress(bytes(10 << 20) + data),
        zipped,
        lambda _: b'{"format": "unspool.session.1"}',
        lambda _: bytes(1000),
    ],
    ids=["nothing", "magic", "gzip", "zip", "json", "zeros"],
)
def test_foreign_files_are_refused_at_their_first_bytes(data: bytes, make: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ImportRejected, match="is no exported session"):
        read_export(make(data), max_bytes=MAX_BYTES, key=None)


def test_a_header_is_bounded_before_it_is_read(data: bytes) -> None:
    huge = data[:12] + struct.pack("<I", 0xFFFFFFFF) + data[16:]
    with pytest.raises(ImportRejected, match=f"a header of 4294967295 bytes; at most {MAX_HEADER_BYTES}"):
        read_export(huge, max_bytes=MAX_BYTES, key=None)
    for text in (b"[" * MAX_HEADER_BYTES, b"9" * MAX_HEADER_BYTES, b"\xff" * 100, b"null", b"{}", b""):
        file = sealed(data[:12] + struct.pack("<I", len(text)) + text)
        with pytest.raises(ImportRejected, match="its header is damaged"):
            read_export(file, max_bytes=MAX_BYTES, key=None)
    newer = sealed(data[:8] + struct.pack("<I", 2) + data[12:-32])
    with pytest.raises(ImportRejected, match="is of version 2; this release reads version 1"):
        read_export(newer, max_bytes=MAX_BYTES, key=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session", "../s"),
        ("session", 7),
        ("created", "now"),
        ("created", float("nan")),
        ("created", 1),
        ("is_signed", 0),
        ("identity", {}),
        ("identity", None),
        ("num_turns", True),
        ("num_turns", -1),
        ("num_turns", 0),
        ("num_turns", 1 << 30),
        ("num_tokens", 1 << 47),
        ("num_tokens", 1 << 60),
        ("num_tokens", 40.0),
        ("num_tokens", 0),
        ("state_bytes", 1 << 47),
        ("state_bytes", 0),
        ("state_bytes", 10),
        ("state_position", 0),
        ("state_position", -1),
        ("state_position", 40),
        ("state_position", "39"),
        ("state_position", ...),
        ("extra", 1),
    ],
)
def test_a_header_that_no_writer_makes_is_refused(data: bytes, field: str, value: object) -> None:
    with pytest.raises(ImportRejected, match="header"):
        read_export(forged(data, **{field: value}), max_bytes=MAX_BYTES, key=None)


@pytest.mark.parametrize(
    "turns",
    [
        [(0, 0, 0, 1.0), (40, 1, 0, 1.0)],
        [(20, 21, 0, 1.0), (20, 1, 0, 1.0)],
        [(20, 1, 2, 1.0), (20, 1, 0, 1.0)],
        [(20, 1, 0, float("inf")), (20, 1, 0, 1.0)],
        [(20, 1, 0, -1.0), (20, 1, 0, 1.0)],
        [(20, 1, 0, 1.0), (19, 1, 0, 1.0)],
        [(20, 1, 0, 1.0), ((1 << 32) - 1, 1, 0, 1.0)],
    ],
)
def test_turns_that_cannot_be_are_refused(data: bytes, turns: list[tuple[int, int, int, float]]) -> None:
    base = read_export(data, max_bytes=MAX_BYTES, key=None)
    plain = write_export(replace(base, turns=base.turns[:2], state=b"", state_position=0), None)
    (length,) = struct.unpack_from("<I", plain, 12)
    table = b"".join(struct.pack("<IIBd", *turn) for turn in turns)
    start = HEADER_START + length
    with pytest.raises(ImportRejected, match="turn"):
        read_export(sealed(plain[:start] + table + plain[start + len(table) : -32]), max_bytes=MAX_BYTES, key=None)


def test_a_session_of_too_many_turns_goes_neither_out_nor_in(
    identity: StateIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn becomes an object of the store."""
    count = MAX_TURNS + 1
    export = SessionExport(
        session="s",
        identity=identity,
        created=1.0,
        turns=(ExportedTurn(1, 1, "stop", 1.0),) * count,
        tokens=bytes(4 * count),
    )
    with pytest.raises(InvalidRequest, match=f"session: has {count} turns; at most {MAX_TURNS} can be exported"):
        write_export(export, None)
    with monkeypatch.context() as patch:
        patch.setattr("unspool.sessions.export.MAX_TURNS", count)
        data = write_export(export, None)
        assert len(read_export(data, max_bytes=MAX_BYTES * 4, key=None).turns) == count
    with pytest.raises(ImportRejected, match="its header is damaged"):
        read_export(data, max_bytes=MAX_BYTES * 4, key=None)


@pytest.mark.parametrize("field", StateIdentity.__dataclass_fields__)
def test_another_models_sessions_are_refused_by_what_differs(
    sessions: Sessions, elsewhere: Sessions, field: str
) -> None:
    data = spoken(sessions)
    identity = header_of(data)["identity"]
    other = forged(data, identity=identity | {field: 3 if field == "depth" else "x" * 64})
    with pytest.raises(ImportRejected, match=f"^made by another model: {field} differs$"):
        elsewhere.import_session("you", other, "copy")
    assert stored(elsewhere) == []


def test_all_fields_that_differ_are_named(sessions: Sessions, open_sessions: Open, identity: StateIdentity) -> None:
    other = open_sessions(MemoryStore(1 << 30), replace(identity, weights="a", template="b"))
    with pytest.raises(ImportRejected, match="weights, template differ"):
        other.import_session("you", spoken(sessions))


def changed_export(data: bytes, **fields: Any) -> bytes:
    return write_export(replace(read_export(data, max_bytes=MAX_BYTES, key=None), **fields), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda export: {"tokens": export.tokens[:-4] + pack_tokens((64,))}, "outside the vocabulary of 64"),
        (lambda export: {"tokens": pack_tokens((-1,)) + export.tokens[4:]}, "outside the vocabulary of 64"),
        (lambda export: {"tokens": pack_tokens(((unpack_tokens(export.tokens)[0] + 1) % 64,)) + export.tokens[4:]},
         "its state cannot be used: log"),
        (lambda export: {"state_position": 38}, "its state cannot be used: log|position"),
        (lambda export: {"state": export.state[:-1]}, "its state cannot be used: truncated"),
        (lambda export: {"state": b"x"}, "its state cannot be used"),
        (lambda export: {"state": bytes(len(export.state))}, "its state cannot be used"),
        (lambda export: {"state": export.state + b"\0"}, "its state cannot be used: oversized"),
        (lambda export: {"state": export.state[:-1] + bytes([export.state[-1] ^ 1])}, "cannot be used: digest"),
        (lambda export: {"state": export.state.replace(b"(export)", b"somebody")}, "cannot be used: digest"),
    ],
)  # fmt: skip
def test_what_anybody_can_make_is_still_checked(
    sessions: Sessions, elsewhere: Sessions, change: Callable[[SessionExport], dict[str, Any]], message: str
) -> None:
    data = spoken(sessions)
    export = read_export(data, max_bytes=MAX_BYTES, key=None)
    with pytest.raises(ImportRejected, match=message):
        elsewhere.import_session("you", changed_export(data, **change(export)), "copy")
    assert stored(elsewhere) == []


def test_a_state_of_another_position_is_refused(
    sessions: Sessions, elsewhere: Sessions, identity: StateIdentity
) -> None:
    """Its file names the right tokens, and a position where they do not end."""
    data = spoken(sessions)
    taken = sessions.records.read("me", "s").states[-1]
    found = sessions.tiers.find(StateKey("me", taken.digest), taken.position)
    assert found is not None
    provenance = StateProvenance(log_digest=taken.digest, owner=NEUTRAL_OWNER)
    moved = bytes(write_state(replace(found.state, position=taken.position + 7), identity, provenance))
    with pytest.raises(ImportRejected, match="its state cannot be used: position: is 46, not 39"):
        elsewhere.import_session("you", changed_export(data, state=moved))


def test_an_owners_own_state_file_is_no_state_of_an_export(sessions: Sessions, store: Store) -> None:
    """Nor is one of an export an owner's: the label that it carries is no name."""
    data = spoken(sessions)
    sessions.flush()
    newest = max(store.list("states/"), key=lambda entry: entry.created)
    own = store.get(newest.key)
    assert own is not None
    with pytest.raises(ImportRejected, match="owner: the state belongs to another"):
        sessions.import_session("me", changed_export(data, state=own))


def test_a_signed_session_is_taken_where_the_key_is(sessions: Sessions, open_sessions: Open) -> None:
    spoken(sessions)
    here = open_sessions(sessions.store, signing_key=KEY)
    there = open_sessions(MemoryStore(1 << 30), signing_key=KEY)
    signed = here.export("me", "s")
    assert there.import_session("you", signed).position == 40
    unkeyed = open_sessions(MemoryStore(1 << 30))
    assert unkeyed.import_session("you", signed).position == 40
    other = open_sessions(MemoryStore(1 << 30), signing_key=b"other" * 10)
    with pytest.raises(ImportRejected, match="was signed with another key"):
        other.import_session("you", signed)
    with pytest.raises(ImportRejected, match="is not signed"):
        there.import_session("you", sessions.export("me", "s"))
    assert stored(other) == []


def test_a_signature_cannot_be_taken_off_or_put_on(data: bytes) -> None:
    signed = write_export(read_export(data, max_bytes=MAX_BYTES, key=None), KEY)
    content, signature = signed[:-64], signed[-64:-32]
    assert signature == hmac.new(KEY, content, hashlib.sha256).digest()
    forgeries = [
        sealed(content),
        sealed(content + bytes(32)),
        sealed(content + hmac.new(b"guess" * 8, content, hashlib.sha256).digest()),
        forged(data, is_signed=True),
        forged(signed, is_signed=False),
        forged(signed, session="other"),
    ]
    for forgery in forgeries:
        with pytest.raises(ImportRejected):
            read_export(forgery, max_bytes=MAX_BYTES, key=KEY)


def test_a_file_is_bounded_before_it_is_read(sessions: Sessions, open_sessions: Open) -> None:
    data = spoken(sessions)
    small = open_sessions(MemoryStore(1 << 30), max_import_bytes=len(data) - 1)
    with pytest.raises(ImportRejected, match=f"{len(data)} bytes; at most max_import_bytes={len(data) - 1}"):
        small.import_session("you", data)
    assert open_sessions(MemoryStore(1 << 30), max_import_bytes=len(data)).import_session("you", data).turns == 3


def test_an_id_that_is_taken_stays_as_it_is(sessions: Sessions, elsewhere: Sessions, data: bytes) -> None:
    elsewhere.create("you", "copy")
    elsewhere.append("you", "copy", text(3))
    before = stored(elsewhere)
    with pytest.raises(SessionExists):
        elsewhere.import_session("you", data, "copy")
    with pytest.raises(InvalidRequest, match="session"):
        elsewhere.import_session("you", data, "../copy")
    assert stored(elsewhere) == before


def test_a_store_without_room_is_left_as_it_was(
    sessions: Sessions, open_sessions: Open, identity: StateIdentity
) -> None:
    sessions.create("me", "s")
    for number in range(12):
        sessions.append("me", "s", text(200, number))
    data = sessions.export("me", "s")
    full = open_sessions(MemoryStore(9_000))
    with pytest.raises(StoreFull):
        full.import_session("you", data, "copy")
    full.flush()
    assert [key for key in stored(full) if not key.startswith("states/")] == []
    with pytest.raises(SessionNotFound):
        full.info("you", "copy")


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 4097])
def test_a_signing_key_has_a_safe_length(tmp_path: Path, key: bytes) -> None:
    with pytest.raises(InvalidRequest, match="signing_key: must have 32 to 4096 bytes"):
        SessionOptions(signing_key=key)
    (tmp_path / "key").write_bytes(key + b"\n")
    with pytest.raises(UserError, match="must have 32 to 4096 bytes; make one with"):
        read_signing_key(tmp_path / "key")


def test_a_signing_key_is_a_file_and_is_not_shown(tmp_path: Path) -> None:
    for ending in (b"", b"\n", b"\r\n"):
        (tmp_path / "key").write_bytes(b"\x00" * 40 + ending)
        assert read_signing_key(tmp_path / "key") == b"\x00" * 40
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_signing_key(tmp_path / "none")
    assert "secret" not in repr(SessionOptions(signing_key=b"secret" * 6))
