"""A session as one file: what made it, its turns, its tokens and a state of it. Knows no store and no engine.

The file, all numbers little-endian: magic, version and header length; a JSON header with every size; 17 bytes a turn;
4 bytes a token; the state as `write_state` makes it; an HMAC-SHA256 of all that if it is signed; and a SHA-256 of
everything before it. Nothing is compressed, so a file holds no more than its length.
"""

import hashlib
import hmac
import json
import math
import struct
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from unspool.requests import InvalidRequest
from unspool.sessions.errors import ImportRejected
from unspool.sessions.head import NAME
from unspool.store import StateIdentity
from unspool.token_bytes import TOKEN_BYTES

MAGIC = b"UNSPSESS"
VERSION = 1
MAX_HEADER_BYTES = 8 << 10
MAX_TURNS = 1 << 16
"""Each becomes an object of the store that a session is imported into."""
MAX_SIZE = 1 << 48
SEAL_BYTES = hashlib.sha256().digest_size

NEUTRAL_OWNER = "(export)"
"""The owner that a state in a file is labelled with. It is no name, so such a state is nobody's until it is imported,
and the file does not tell whose it was."""

FINISH_REASONS = ("length", "stop")
"""How a turn that was committed can have ended."""

_PREFIX = struct.Struct("<8sII")
_TURN = struct.Struct("<IIBd")


class ExportedTurn(NamedTuple):
    num_tokens: int
    given: int
    finish_reason: str
    created: float


@dataclass(frozen=True, kw_only=True)
class SessionExport:
    """What a file says. Whether it may be believed is for whoever imports it."""

    session: str
    """The id that it had."""
    identity: StateIdentity
    created: float
    """Seconds since 1970 (UTC)."""
    turns: tuple[ExportedTurn, ...]
    tokens: bytes = field(repr=False)
    """Of all turns, as `pack_tokens` gives them."""
    state_position: int = 0
    """Tokens that the state has consumed; 0 when there is none."""
    state: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class _Header:
    session: str
    created: float
    identity: StateIdentity
    num_turns: int
    num_tokens: int
    state_position: int
    state_bytes: int
    is_signed: bool

    @property
    def content_bytes(self) -> int:
        """What follows the header up to the seals."""
        return self.num_turns * _TURN.size + self.num_tokens * TOKEN_BYTES + self.state_bytes


def write_export(export: SessionExport, key: bytes | None) -> bytes:
    """The file's bytes, signed when there is a key. Raises InvalidRequest for a session of too many turns."""
    if len(export.turns) > MAX_TURNS:
        raise InvalidRequest("session", f"has {len(export.turns)} turns; at most {MAX_TURNS} can be exported")
    header = _Header(
        session=export.session,
        created=export.created,
        identity=export.identity,
        num_turns=len(export.turns),
        num_tokens=len(export.tokens) // TOKEN_BYTES,
        state_position=export.state_position,
        state_bytes=len(export.state),
        is_signed=key is not None,
    )
    text = json.dumps(asdict(header), separators=(",", ":")).encode()
    table = b"".join(
        _TURN.pack(turn.num_tokens, turn.given, FINISH_REASONS.index(turn.finish_reason), turn.created)
        for turn in export.turns
    )
    parts = [_PREFIX.pack(MAGIC, VERSION, len(text)), text, table, export.tokens, export.state]
    content = b"".join(parts)
    signature = _signature(content, key) if key is not None else b""
    return b"".join([content, signature, hashlib.sha256(content + signature).digest()])


def read_export(data: bytes, *, max_bytes: int, key: bytes | None) -> SessionExport:
    """What a file holds, nothing of which has changed since it was written; with a key the file must be signed by it.

    Raises ImportRejected. Each check is made before the work that it would save: size, magic, version, header, sizes,
    digest, signature, turns.
    """
    header, start = _read_header(data, max_bytes)
    _check_seals(data, header.is_signed, key)
    view = memoryview(data)[start:]
    tokens_start = header.num_turns * _TURN.size
    state_start = tokens_start + header.num_tokens * TOKEN_BYTES
    return SessionExport(
        session=header.session,
        identity=header.identity,
        created=header.created,
        turns=_read_turns(view[:tokens_start], header.num_tokens),
        tokens=bytes(view[tokens_start:state_start]),
        state_position=header.state_position,
        state=bytes(view[state_start : state_start + header.state_bytes]),
    )


def _read_header(data: bytes, max_bytes: int) -> tuple[_Header, int]:
    """The header, and where the turns begin. Whoever passes has exactly the length that the header gives."""
    if len(data) > max_bytes:
        raise ImportRejected(f"{len(data)} bytes; at most max_import_bytes={max_bytes} may be imported")
    if not data.startswith(MAGIC) or len(data) < _PREFIX.size:
        raise ImportRejected("is no exported session")
    _, version, length = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise ImportRejected(f"is of version {version}; this release reads version {VERSION}")
    if length > MAX_HEADER_BYTES:
        raise ImportRejected(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} can be right")
    start = _PREFIX.size + length
    header = _parse_header(data[_PREFIX.size : start])
    expected = start + header.content_bytes + SEAL_BYTES * (2 if header.is_signed else 1)
    if len(data) != expected:
        raise ImportRejected(f"{len(data)} bytes where its header asks for {expected}: it is cut off or damaged")
    return header, start


def _parse_header(text: bytes) -> _Header:
    try:
        values: dict[str, Any] = json.loads(text)
        header = _Header(**(values | {"identity": _identity(values["identity"])}))
        _check_header(header)
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # nested deeper than Python's parser goes
        raise ImportRejected(f"its header is damaged ({type(error).__name__})") from error
    return header


def _identity(values: dict[str, Any]) -> StateIdentity:
    identity = StateIdentity(**values)
    if type(identity.depth) is not int or not all(
        isinstance(value, str) for name, value in values.items() if name != "depth"
    ):
        raise ValueError("identity")
    return identity


def _check_header(header: _Header) -> None:
    """Raises ValueError for values that no writer gives."""
    if not (isinstance(header.session, str) and NAME.fullmatch(header.session)):
        raise ValueError("session")
    if not (type(header.created) is float and _is_time(header.created)) or type(header.is_signed) is not bool:
        raise ValueError("created or is_signed")
    for size in (header.num_turns, header.num_tokens, header.state_position, header.state_bytes):
        if type(size) is not int or not 0 <= size <= MAX_SIZE:
            raise ValueError("a size")
    if header.num_turns > min(MAX_TURNS, header.num_tokens) or bool(header.num_turns) != bool(header.num_tokens):
        raise ValueError("turns")
    if bool(header.state_bytes) != bool(header.state_position) or header.state_position >= max(header.num_tokens, 1):
        raise ValueError("state_position")


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and 0 <= seconds < 1e11


def _check_seals(data: bytes, is_signed: bool, key: bytes | None) -> None:
    view = memoryview(data)
    sealed, digest = view[:-SEAL_BYTES], view[-SEAL_BYTES:]
    if not hmac.compare_digest(hashlib.sha256(sealed).digest(), digest):
        raise ImportRejected("has changed since it was written: it is damaged")
    if key is None:
        return
    if not is_signed:
        raise ImportRejected("is not signed; this server imports only what its signing key has signed")
    if not hmac.compare_digest(_signature(sealed[:-SEAL_BYTES], key), sealed[-SEAL_BYTES:]):
        raise ImportRejected("was signed with another key than this server's")


def _read_turns(table: memoryview, num_tokens: int) -> tuple[ExportedTurn, ...]:
    turns: list[ExportedTurn] = []
    for count, given, reason, created in _TURN.iter_unpack(table):
        if not (count and given <= count and reason < len(FINISH_REASONS) and _is_time(created)):
            raise ImportRejected(f"turn {len(turns) + 1} is impossible")
        turns.append(ExportedTurn(count, given, FINISH_REASONS[reason], created))
    if sum(turn.num_tokens for turn in turns) != num_tokens:
        raise ImportRejected(f"its turns do not have its {num_tokens} tokens")
    return tuple(turns)


def _signature(content: bytes | memoryview, key: bytes) -> bytes:
    return hmac.new(key, content, hashlib.sha256).digest()
