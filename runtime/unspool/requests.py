"""The messages between whoever wants text and the engine that owns the slots: requests in, events out, tokens only."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MIN_REPETITION_PENALTY = 0.01
"""Logits divided by much less overflow."""


class InvalidRequest(ValueError):
    """A request that can never succeed. `field` names what is wrong, the message says what would be right."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class EngineBusy(RuntimeError):
    """The queue is full; try again later."""


class EngineDead(RuntimeError):
    """The engine thread stopped on an error; nothing will be answered until it is restarted."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the next token. Names and meanings are the OpenAI API's and vLLM's.

    Raises InvalidRequest when a value is out of range.
    """

    temperature: float = field(default=1.0, metadata={"help": "0 is greedy"})
    top_k: int = field(default=0, metadata={"help": "keep the k most likely tokens; 0 or -1 keeps all"})
    top_p: float = field(default=1.0, metadata={"help": "keep the smallest set of tokens with this probability"})
    min_p: float = field(default=0.0, metadata={"help": "drop tokens below this share of the best one's probability"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "divide the logits of tokens already seen"})
    presence_penalty: float = field(default=0.0, metadata={"help": "subtract once from generated tokens' logits"})
    frequency_penalty: float = field(default=0.0, metadata={"help": "subtract per occurrence in the generated text"})
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable"})
    logit_bias: dict[int, float] = field(default_factory=dict, metadata={"flag": False})

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not isinstance(self.top_k, int) or self.top_k < -1:
            raise InvalidRequest("top_k", "must be 0 or -1 (all tokens) or a positive count")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise InvalidRequest("seed", "must fit in 64 bits")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest("logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
        for bias in self.logit_bias.values():
            _in_range("logit_bias", bias, -100.0, 100.0)


def _in_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = low < value <= high if low_open else low <= value <= high
    if not (math.isfinite(value) and inside):
        relation = "above" if low_open else "at least"
        raise InvalidRequest(name, f"must be {relation} {low:g} and at most {high:g}")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to continue it. Token ids only: text, templates and stop strings are the caller's."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int = 16
    """Tokens to generate; 0 only reads the prompt (for its log-probabilities)."""
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the generation; the one that does is reported in the last event."""
    logprobs: int | None = None
    """Report each generated token's log-probability and this many of the most likely ones. None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for each prompt token given those before it (the first has none)."""


class TokenLogprobs(NamedTuple):
    """Natural-log probabilities under the model's own distribution (temperature 1, before penalties and filters)."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and their log-probabilities, best first."""


class PromptEvent(NamedTuple):
    """The prompt has been read. Sent only when `prompt_logprobs` was asked for, before the first token."""

    request_id: str
    logprobs: tuple[TokenLogprobs | None, ...]


class TokenEvent(NamedTuple):
    """One generated token. The engine sends them in order."""

    request_id: str
    token: int
    logprobs: TokenLogprobs | None


class FinishEvent(NamedTuple):
    """The last event of every request."""

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    error: str | None = None


EngineEvent = PromptEvent | TokenEvent | FinishEvent

EventSink = Callable[[EngineEvent], None]
"""Called on the engine's thread for each event of one request; must return at once and must not raise."""
