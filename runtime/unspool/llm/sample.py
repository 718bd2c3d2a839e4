"""One sample of a prompt as it grows: the engine's tokens become text and log-probabilities. Knows no engine."""

from collections.abc import Callable
from dataclasses import dataclass

from unspool.llm.outputs import CompletionOutput, FinishReason, Logprob, TokenLogprobs
from unspool.llm.params import SamplingParams
from unspool.requests import FinishReason as EngineFinishReason
from unspool.requests import TokenEvent
from unspool.requests import TokenLogprobs as EngineLogprobs
from unspool.text import TextStream


class Sample:
    """Takes the events of one engine request."""

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        stream: TextStream,
        eos_ids: frozenset[int],
        token_text: Callable[[int], str],
    ) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._stream = stream
        self._eos_ids = eos_ids
        self._stop_ids = params.stop_ids(eos_ids)
        self._token_text = token_text
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._stop_reason: int | str | None = None
        self._error: str | None = None

    def take(self, event: TokenEvent) -> str:
        """The text that has become certain with this token."""
        self._token_ids.append(event.token)
        if event.logprobs is not None:
            self._logprobs.append(named_logprobs(event.token, event.logprobs, self._token_text))
        if event.token in self._stop_ids and not self._params.include_stop_str_in_output:
            return ""
        text = self._stream.push(event.token)
        if self._stream.stopped and self._params.include_stop_str_in_output:
            text += self._stream.stop_string or ""
        return self._add(text)

    def finish(self, reason: EngineFinishReason, stopped_by: int | str | None = None, error: str | None = None) -> str:
        """The rest of the text."""
        rest = self._add(self._stream.finish())
        assert reason != "cancelled", "only what nobody waits for is cancelled"
        self.finish_reason, self._error = reason, error
        is_models_own = stopped_by in self._eos_ids and not self._params.ignore_eos
        self._stop_reason = None if is_models_own else stopped_by
        return rest

    def piece(self, delta: str) -> "StreamPiece":
        """What is streamed when `delta` has come."""
        return StreamPiece(self, delta, self.finish_reason, len(self._token_ids), len(self._texts))

    def output(self, num_tokens: int | None = None, num_texts: int | None = None) -> CompletionOutput:
        """All of it, or what it was when it had so many tokens and pieces of text."""
        is_whole = num_tokens is None
        logprobs = self._logprobs[:num_tokens]
        token_ids = self._token_ids[:num_tokens]
        scores = [place[token].logprob for token, place in zip(token_ids, logprobs, strict=False)]
        asked = self._params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._texts[:num_texts]),
            token_ids=token_ids,
            cumulative_logprob=sum(scores) if asked or self._params.ranks_samples else None,
            logprobs=logprobs if asked else None,
            finish_reason=self.finish_reason if is_whole else None,
            stop_reason=self._stop_reason if is_whole else None,
            error=self._error if is_whole else None,
        )

    def _add(self, text: str) -> str:
        if text:
            self._texts.append(text)
        return text


@dataclass(frozen=True)
class StreamPiece:
    """The next piece of a sample's text."""

    _sample: Sample
    delta: str
    finish_reason: FinishReason | None
    """Says why it is the last; None for all others."""
    _num_tokens: int
    _num_texts: int

    @property
    def index(self) -> int:
        """Of the sample."""
        return self._sample.index

    @property
    def output(self) -> CompletionOutput:
        """The sample up to this piece. Made when it is asked for: a long text is not copied for every piece of it."""
        if self.finish_reason is not None:
            return self._sample.output()
        return self._sample.output(self._num_tokens, self._num_texts)


def named_logprobs(token: int, scores: EngineLogprobs, token_text: Callable[[int], str]) -> TokenLogprobs:
    """The engine's log-probabilities of one place, as a call returns them."""
    ranks = {likely: rank for rank, (likely, _) in enumerate(scores.top, start=1)}
    values = {token: scores.logprob} | dict(scores.top)
    return {each: Logprob(value, ranks.get(each), token_text(each)) for each, value in values.items()}
