"""The messages between whoever wants text and the engine that owns the slots: requests in, events out, tokens only."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from unspool.constraint import Constraint
from unspool.state import SlotSnapshot

FinishReason = Literal["stop", "length", "cancelled", "expired", "error"]

CacheMiss = Literal["disabled", "cold", "diverged", "evicted"]
"""Why a prompt, or the rest of it, had to be read: the cache was not to be used, knew nothing like it, knew it up to
where it leaves what was read before, or had to give up a checkpoint that would have served."""

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MIN_REPETITION_PENALTY = 0.01
"""Logits divided by much less overflow."""
MAX_MIN_TOKENS = 1 << 20

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_NESTING = 32
MAX_REGEX_BYTES = 4 << 10
MAX_GRAMMAR_BYTES = 64 << 10
MAX_CHOICES = 256
MAX_CHOICE_CHARACTERS = 256


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
    min_tokens: int = field(default=0, metadata={"help": "generate so many tokens before anything may stop"})
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
        if not isinstance(self.min_tokens, int) or not 0 <= self.min_tokens <= MAX_MIN_TOKENS:
            raise InvalidRequest("min_tokens", f"must be a count between 0 and {MAX_MIN_TOKENS}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest("logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
        for bias in self.logit_bias.values():
            _in_range("logit_bias", bias, -100.0, 100.0)


def _in_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = low < value <= high if low_open else low <= value <= high
    if not (math.isfinite(value) and inside):
        relation = "above" if low_open else "at least"
        raise InvalidRequest(name, f"must be {relation} {low:g} and at most {high:g}")


StructureKind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

_MAX_BYTES = {"json_schema": MAX_SCHEMA_BYTES, "regex": MAX_REGEX_BYTES, "grammar": MAX_GRAMMAR_BYTES}


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What form the generated text must have. Sizes are checked here; whether it makes sense, when it is compiled.

    `value` is a JSON schema's text, a regular expression that the whole text matches (Rust's syntax; \\d and \\w are
    ASCII), a grammar (Lark's or llama.cpp's notation), or the strings to choose from; "json_object", any JSON object,
    has none. `parameter` is the request's field that it came from: InvalidRequest names it, never the value.
    """

    kind: StructureKind
    value: str | tuple[str, ...] = ""
    parameter: str = field(default="response_format", compare=False)

    def __post_init__(self) -> None:
        if self.kind == "choice":
            self._check_choices()
        elif self.kind == "json_object":
            if self.value:
                raise self.refused("takes no value when any JSON object will do")
        elif self.kind in _MAX_BYTES:
            self._check_text(_MAX_BYTES[self.kind])
        else:
            raise self.refused("must be of kind json_schema, json_object, regex, grammar or choice")
        if self.kind == "json_schema":
            self._check_schema()

    def refused(self, message: str) -> InvalidRequest:
        """The error that says what is wrong with it."""
        return InvalidRequest(self.parameter, message)

    def _check_choices(self) -> None:
        if not isinstance(self.value, tuple) or not 1 <= len(self.value) <= MAX_CHOICES:
            raise self.refused(f"must hold 1 to {MAX_CHOICES} strings")
        for choice in self.value:
            if not isinstance(choice, str) or not 1 <= len(choice) <= MAX_CHOICE_CHARACTERS:
                raise self.refused(f"each choice must be a string of 1 to {MAX_CHOICE_CHARACTERS} characters")
            self._size(choice)

    def _check_text(self, limit: int) -> None:
        if not isinstance(self.value, str) or not self.value:
            raise self.refused("must be a string that is not empty")
        # A character takes a byte at least, so a huge text is refused before it is encoded.
        if len(self.value) > limit or self._size(self.value) > limit:
            raise self.refused(f"at most {limit} bytes")

    def _size(self, text: str) -> int:
        try:
            return len(text.encode())
        except UnicodeEncodeError as error:
            raise self.refused("has half of a surrogate pair") from error

    def _check_schema(self) -> None:
        assert isinstance(self.value, str)
        if _nesting(self.value) > MAX_SCHEMA_NESTING:
            raise self.refused(f"may be nested at most {MAX_SCHEMA_NESTING} deep")
        try:
            schema = json.loads(self.value)
        except ValueError as error:
            raise self.refused("is not valid JSON") from error
        if not isinstance(schema, dict):
            raise self.refused("must be a JSON object")


def _nesting(text: str) -> int:
    """How deep a JSON text's objects and arrays are nested; found without parsing it, which would recurse."""
    depth = deepest = 0
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"?|[\[{}\]]', text, re.DOTALL):
        depth += (bracket in "[{") - (bracket in "]}")
        deepest = max(deepest, depth)
    return deepest


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to continue it. Token ids only: text, templates and stop strings are the caller's."""

    request_id: str
    prompt: tuple[int, ...]
    start: SlotSnapshot | None = None
    """The state that the prompt follows, of this model; it is copied. None is an empty one."""
    keep_state: bool = False
    """Report the state after the last token that was read, unless the request fails or is cancelled."""
    max_tokens: int = 16
    """Tokens to generate; 0 only reads the prompt (for its log-probabilities or its state)."""
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the generation; the one that does is reported in the last event."""
    stop: tuple[str, ...] = ()
    """Strings that end the generation with the token that completes one."""
    continues_text: bool = False
    """For stop strings: the text goes on where the prompt ends, rather than being one of its own, so that a space at
    its beginning counts."""
    skip_special_tokens: bool = True
    """For stop strings: they are looked for in a text without special tokens."""
    constraint: Constraint | None = None
    """What the generated text may be; the engine uses a copy. When nothing may follow, the generation ends."""
    logprobs: int | None = None
    """Report each generated token's log-probability and this many of the most likely ones. None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for each prompt token given those before it (the first has none)."""
    owner: str = ""
    """Whose request it is. Slots are shared fairly among owners, and nobody starts from another's checkpoint."""
    priority: int = 0
    """Lower goes first, and takes the slot of a request with a higher number, which goes on later where it was."""
    deadline: float | None = None
    """Seconds after which the answer is of no use: a request that still waits for its first slot then expires. Of an
    owner's requests of one priority the earliest goes first."""
    use_cache: bool = True
    """Whether the prompt may start from a checkpoint of an earlier one, and leave some itself."""
    checkpoints: tuple[int, ...] = ()
    """Positions of the prompt at which others are likely to part from it, such as the end of its instructions."""


class TokenLogprobs(NamedTuple):
    """Natural-log probabilities under the model's own distribution (temperature 1, before penalties and filters)."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and their log-probabilities, best first."""


class PromptEvent(NamedTuple):
    """The prompt has been read. Sent once, before the first token."""

    request_id: str
    cached_tokens: int
    """Tokens of the prompt that a checkpoint saved from being read."""
    cache_miss: CacheMiss | None
    """Why the rest of the prompt was read; None when next to nothing was left."""
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """What `prompt_logprobs` asks for."""


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
    stopped_by: int | str | None = None
    """The stop token or stop string that was met."""
    state: SlotSnapshot | None = None
    """What `keep_state` asks for: after every token of the prompt and every generated one but the last, which has not
    been read, or after the whole prompt when nothing was generated."""


EngineEvent = PromptEvent | TokenEvent | FinishEvent

EventSink = Callable[[EngineEvent], None]
"""Called on the engine's thread for each event of one request; must return at once and must not raise."""
