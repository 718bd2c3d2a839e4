"""A request on its way through the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from unspool.requests import CacheMiss, EventSink, GenerationRequest, TokenLogprobs
from unspool.sampling import Sampler
from unspool.state import SlotSnapshot
from unspool.text import StopWatcher
from unspool.token_bytes import pack_tokens
from unspool_kernels.logit_rows import LogitRows


@dataclass(eq=False)
class EngineSequence:
    """Which slot a request has, how much of its prompt is read, and what it has produced."""

    request: GenerationRequest
    sink: EventSink
    sampler: Sampler
    watcher: StopWatcher | None
    number: int
    """Its place among all requests, by arrival."""
    arrived: float
    """Seconds of the monotonic clock, as `queued` and `deadline` are."""
    level: int = 0
    """Its priority when it got its slot, raised by its waiting: only what is more urgent than that takes it away."""
    slot: int = -1
    consumed: int = 0
    """Tokens of the prompt that are read."""
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    parked: SlotSnapshot | None = None
    """Its state while another has its slot."""
    cuts: list[int] = field(default_factory=list)
    """Positions, the nearest last, at which reading stops to keep a checkpoint."""
    follows: "tuple[EngineSequence, int] | None" = None
    """One that is reading the same prefix, for whose checkpoint at that position this waits."""
    cached: int = 0
    """Tokens of the prompt that a checkpoint saved from being read."""
    cache_miss: CacheMiss | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.tokens = pack_tokens(self.request.prompt)
        self.queued = self.arrived
        """When its present waiting began."""
        wait = self.request.deadline
        self.deadline = float("inf") if wait is None else self.arrived + wait

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt is."""
        return self.consumed == len(self.request.prompt)

    @property
    def uses_cache(self) -> bool:
        """Scores need every token's logits, and what follows a given state has no prefix that others could share."""
        return self.request.use_cache and self.request.start is None and self.request.prompt_logprobs is None


@dataclass(frozen=True)
class Piece:
    """Tokens that a sequence brings to one call, and the logits that it wants of them."""

    sequence: EngineSequence
    tokens: Sequence[int]
    want: LogitRows

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """This piece's own rows of logits, and those of the pieces after it."""
        count = {"none": 0, "last": 1, "every": len(self.tokens)}[self.want]
        return rows[:count], rows[count:]
