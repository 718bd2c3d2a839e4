"""What a call returns. Names are vLLM's where it has them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from unspool.sessions.results import StateSource

FinishReason = Literal["stop", "length", "expired", "error"]


class Logprob(NamedTuple):
    """A token's natural-log probability under the model's own distribution, before sampling changes it."""

    logprob: float
    rank: int | None
    """1 for the most likely token; None for a token that is not among those that were asked for."""
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Of one place: the token that is there, then the most likely ones."""


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One sample, or as much of it as there is yet."""

    index: int
    text: str
    token_ids: list[int]
    """With the token that ended the text, which is no part of it."""
    cumulative_logprob: float | None
    """Of all tokens together; known when `logprobs` or `best_of` asks for it."""
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    """None while it goes on. "stop": the model, a stop string or a structure ended it; "length": `max_tokens` did;
    "expired": it had not begun by its deadline; "error": see `error`."""
    stop_reason: int | str | None
    """The stop string or the token of `stop_token_ids` that ended it; None for the model's own end."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its samples."""

    request_id: str
    prompt: str | None
    """None when it was given as tokens, or as messages."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    """The first token has none."""
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    """Tokens of the prompt that were not read for the first sample, since the engine still knew their state."""


@dataclass(frozen=True, kw_only=True)
class TurnOutput(CompletionOutput):
    """A turn of a session that was committed."""

    generation: int
    """Changes of the session's log so far."""
    turn: int
    """Turns of the log, with this one."""
    position: int
    """Tokens of the log, with this turn's."""
    prompt_tokens: int
    """Tokens that the answer follows: the log before this turn and what the turn was given."""
    cached_tokens: int
    """How many of these were not read, as a state that had consumed them was at hand."""
    state_source: StateSource
    replayed_tokens: int
    """Tokens of the log that were read again. The last one always is, as no state has it."""
    restore_seconds: float
