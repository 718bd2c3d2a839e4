"""One turn of a session: what is asked of it, and the engine's events as text and an output. Knows no store."""

from dataclasses import dataclass

from unspool.llm.outputs import TurnOutput
from unspool.llm.params import SamplingParams
from unspool.llm.sample import Sample
from unspool.requests import FinishEvent, InvalidRequest, PromptEvent, TokenEvent
from unspool.sessions import TurnRequest, TurnResult


@dataclass(frozen=True)
class TurnPiece:
    """The next piece of a turn's text. Only the last has the turn, which is then committed."""

    delta: str
    turn: TurnOutput | None = None


class Turn:
    """A turn's request, and what has come of it."""

    def __init__(self, request: TurnRequest, sample: Sample) -> None:
        self.request = request
        self._sample = sample
        self._num_cached = 0

    def take(self, event: PromptEvent | TokenEvent | FinishEvent) -> str:
        """The text that an event completes."""
        if isinstance(event, TokenEvent):
            return self._sample.take(event)
        if isinstance(event, PromptEvent):
            self._num_cached = event.cached_tokens
        return ""

    def end(self, result: TurnResult) -> TurnPiece:
        rest = self._sample.finish("stop" if result.finish_reason == "stop" else "length", result.stopped_by)
        before = result.position - len(result.tokens) - len(self.request.tokens)
        output = TurnOutput(
            **vars(self._sample.output()),
            generation=result.generation,
            turn=result.turn,
            position=result.position,
            prompt_tokens=before + len(self.request.tokens),
            cached_tokens=before - result.replayed_tokens + self._num_cached,
            state_source=result.state_source,
            replayed_tokens=result.replayed_tokens,
            restore_seconds=result.restore_seconds,
        )
        return TurnPiece(rest, output)


def check_turn(params: SamplingParams) -> None:
    """Raises InvalidRequest for what a turn cannot have."""
    if params.num_samples > 1:
        raise InvalidRequest(
            "n" if params.best_of is None else "best_of", "must be 1 in a session; fork it for alternatives"
        )
    if params.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs", "a session does not read its log again; use LLM.generate")
