"""One answer of a request as it grows: the engine's events become pieces of text with their tokens. Knows no format."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unspool.requests import (
    EngineEvent,
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    TokenEvent,
    TokenLogprobs,
)
from unspool.text import TextStream
from unspool_server.errors import internal_error, unavailable
from unspool_server.vocabulary import TextOffsets

StopReason = Literal["stop", "length"]


class ScoredToken(NamedTuple):
    """A token, the character of the text at which it begins, and its log-probabilities if it has any."""

    token: int
    offset: int
    logprobs: TokenLogprobs | None


class Piece(NamedTuple):
    """Text that has become certain and the tokens it came with; the last piece says why it is the last."""

    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: StopReason | None = None


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were not read, as a checkpoint of an earlier one had them."""
    completion_tokens: int

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice:
    """One generation of a request. `echo` is the prompt's text when it is part of the answer."""

    def __init__(
        self, index: int, request: GenerationRequest, stream: TextStream, offsets: TextOffsets, echo: str = ""
    ) -> None:
        self.index = index
        self.request = request
        self.num_generated = 0
        self.num_cached = 0
        self._stream = stream
        self._offsets = offsets
        self._echo = echo
        self._held: list[ScoredToken] = []

    def opening(self) -> Piece | None:
        """What is known before the engine has said anything."""
        return Piece(self._echo) if self._echo and self.request.prompt_logprobs is None else None

    def absorb(self, event: EngineEvent) -> Piece | None:
        """The piece that an event completes. Raises ApiError when the engine could not finish the generation."""
        match event:
            case PromptEvent():
                return self._absorb_prompt(event)
            case TokenEvent():
                return self._absorb_token(event)
            case FinishEvent():
                return self._finish(event)

    def _absorb_prompt(self, event: PromptEvent) -> Piece | None:
        self.num_cached = event.cached_tokens
        if event.logprobs is None:
            return None
        scored = zip(self.request.prompt, event.logprobs, strict=True)
        tokens = tuple(ScoredToken(token, self._offsets.advance(token), logprobs) for token, logprobs in scored)
        return Piece(self._echo, tokens)

    def _absorb_token(self, event: TokenEvent) -> Piece | None:
        self.num_generated += 1
        if self.request.logprobs is not None:
            self._held.append(ScoredToken(event.token, self._offsets.advance(event.token), event.logprobs))
        if event.token in self.request.stop_ids:
            return None  # it ends the text and is no part of it; the engine's last event follows
        text = self._stream.push(event.token)
        if self._stream.stopped:
            return self._piece(text, "stop")
        return self._piece(text, None) if text else None

    def _finish(self, event: FinishEvent) -> Piece:
        if event.reason == "error":
            raise internal_error()
        if event.reason == "cancelled" or event.reason == "expired":
            raise unavailable("the server is shutting down", "shutting_down")
        text = self._stream.finish()
        return self._piece(text, "stop" if self._stream.stopped else event.reason)

    def _piece(self, text: str, finish_reason: StopReason | None) -> Piece:
        held, self._held = tuple(self._held), []
        return Piece(text, held, finish_reason)


def usage_of(choices: Iterable[Choice]) -> Usage:
    choices = list(choices)
    return Usage(
        prompt_tokens=sum(len(choice.request.prompt) for choice in choices),
        cached_tokens=sum(choice.num_cached for choice in choices),
        completion_tokens=sum(choice.num_generated for choice in choices),
    )


def joined(pieces: Iterable[Piece]) -> Piece:
    """Consecutive pieces as one."""
    pieces = list(pieces)
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece("".join(piece.text for piece in pieces), tokens, pieces[-1].finish_reason)
