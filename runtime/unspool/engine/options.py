"""How much an engine holds and how it shares its time."""

from dataclasses import dataclass, field

from unspool.requests import InvalidRequest
from unspool.sizes import ByteSize, format_size

MAX_COUNT = 1 << 20
DEFAULT_CACHE_BYTES = ByteSize(512 << 20)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Raises InvalidRequest, naming the field, for a value out of range."""

    max_slots: int = field(default=8, metadata={"help": "sequences computed at once; each takes one state"})
    slot_memory: ByteSize | None = field(
        default=None, metadata={"help": "lend fewer slots than that if their states would take more, like 2GB"}
    )
    prefill_chunk: int = field(default=128, metadata={"help": "prompt tokens read between two decode steps, at most"})
    decode_interval_ms: int = field(
        default=100,
        metadata={"help": "read fewer prompt tokens at once than would keep those that decode waiting longer"},
    )
    max_queue: int = field(default=256, metadata={"help": "requests that may wait for a slot"})
    ageing_seconds: int = field(
        default=10, metadata={"help": "waiting that raises a request's priority by one, so that none starves"}
    )
    prefix_cache: ByteSize = field(
        default=DEFAULT_CACHE_BYTES,
        metadata={"help": "memory for states at the ends and branches of prompts; 0 keeps none"},
    )

    def __post_init__(self) -> None:
        for name in ("max_slots", "prefill_chunk", "decode_interval_ms", "max_queue", "ageing_seconds"):
            if not 1 <= getattr(self, name) <= MAX_COUNT:
                raise InvalidRequest(name, f"must be between 1 and {MAX_COUNT}")

    def slots_for(self, state_bytes: int) -> int:
        """Slots for states of that size. Raises InvalidRequest when the budget holds none."""
        if self.slot_memory is None:
            return self.max_slots
        fitting = self.slot_memory // state_bytes
        if fitting < 1:
            needed = format_size(state_bytes)
            raise InvalidRequest("slot_memory", f"holds no slot: one state of this model takes {needed}")
        return min(self.max_slots, fitting)
