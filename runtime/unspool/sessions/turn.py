"""A turn of a session's log: an immutable record of the tokens that it added."""

import hashlib
import hmac
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from unspool.sessions.log_digest import LogDigest
from unspool.store import StoreCorrupt
from unspool.token_bytes import TOKEN_BYTES

FORMAT = "unspool.turn.1"
MAX_HEADER_BYTES = 16 << 10


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Tokens [start, start + len(tokens)) of a log that goes back through `parent`, of which it may use only a part."""

    id: str = field(default_factory=lambda: f"turn_{uuid.uuid4().hex}")
    parent: str | None
    number: int
    """Turns of the log up to this one, with it."""
    start: int
    tokens: bytes
    """As `pack_tokens` gives them."""
    given: int
    """How many of them were given; the rest were generated."""
    before: LogDigest
    """Of the log up to `start`."""
    made_by: str
    """The key of the session that added it: nobody else may delete it."""
    finish_reason: str
    created: float = field(default_factory=time.time)
    """Seconds since 1970 (UTC)."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens) // TOKEN_BYTES

    def digest_at(self, position: int) -> LogDigest:
        """Of the log up to a position in (start, end]."""
        return self.before.extend(self.tokens[: (position - self.start) * TOKEN_BYTES])

    def encode(self) -> bytes:
        """A line of JSON, then the tokens; the digest in the line covers both."""
        header = self._header() | {"digest": ""}
        header["digest"] = _digest(header, self.tokens)
        return json.dumps(header).encode() + b"\n" + self.tokens

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "id": self.id,
            "parent": self.parent,
            "number": self.number,
            "start": self.start,
            "given": self.given,
            "chain": self.before.chain.hex(),
            "tail": self.before.tail.hex(),
            "made_by": self.made_by,
            "finish_reason": self.finish_reason,
            "created": self.created,
        }

    @classmethod
    def decode(cls, key: str, data: bytes) -> "Turn":
        """Raises StoreCorrupt, naming the key, for a record that is not whole as it was written."""
        line, _, tokens = data.partition(b"\n")
        try:
            if len(line) > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(line)
            if not hmac.compare_digest(header["digest"], _digest(header, tokens)):
                raise ValueError("it has changed since it was written")
            if header["format"] != FORMAT:
                raise ValueError("it is of another version")
            return cls(
                id=header["id"],
                parent=header["parent"],
                number=header["number"],
                start=header["start"],
                tokens=tokens,
                given=header["given"],
                before=LogDigest(header["start"], bytes.fromhex(header["chain"]), bytes.fromhex(header["tail"])),
                made_by=header["made_by"],
                finish_reason=header["finish_reason"],
                created=header["created"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = (
                f"{key}: the record of a turn is damaged ({error}); restore it from a backup or delete the session"
            )
            raise StoreCorrupt(message) from error


def _digest(header: dict[str, Any], tokens: bytes) -> str:
    text = json.dumps(header | {"digest": ""}, sort_keys=True)
    return hashlib.sha256(text.encode() + b"\n" + tokens).hexdigest()
