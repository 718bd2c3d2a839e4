"""What sessions may take."""

from dataclasses import dataclass, field

from unspool.requests import InvalidRequest
from unspool.sizes import ByteSize

MAX_TURN_TOKENS = 1 << 22
MIN_KEY_BYTES, MAX_KEY_BYTES = 32, 4096


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Raises InvalidRequest, naming the field, for a value out of range."""

    state_memory: ByteSize = field(
        default=ByteSize(1 << 30),
        metadata={"help": "memory for states of sessions without a slot, beside up to nine that wait to be stored"},
    )
    max_turn_tokens: int = field(
        default=1 << 20, metadata={"help": "tokens that one turn may add, given and generated together"}
    )
    lease_seconds: int = field(
        default=0,
        metadata={"help": "keep other processes that share the store from a session so long at a turn; 0: alone"},
    )
    max_import_bytes: ByteSize = field(
        default=ByteSize(1 << 29), metadata={"help": "bytes that a session to be imported may have"}
    )
    signing_key: bytes | None = field(default=None, repr=False, metadata={"flag": False})
    """Signs exported sessions; those that it has not signed are not imported. Read it with `read_signing_key`."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_turn_tokens <= MAX_TURN_TOKENS:
            raise InvalidRequest("max_turn_tokens", f"must be between 1 and {MAX_TURN_TOKENS}")
        if not 0 <= self.lease_seconds <= 86_400:
            raise InvalidRequest("lease_seconds", "must be between 0 and 86400")
        if self.signing_key is not None and not MIN_KEY_BYTES <= len(self.signing_key) <= MAX_KEY_BYTES:
            raise InvalidRequest("signing_key", f"must have {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes")
