"""What one call asks for: how tokens are chosen, how many samples, where they end, and what is told about them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from unspool.requests import MAX_LOGPROBS, InvalidRequest, StructuredOutput
from unspool.requests import SamplingParams as TokenSampling

MAX_SAMPLES = 128
SEEDS = 1 << 64


@dataclass(frozen=True, kw_only=True)
class SamplingParams(TokenSampling):
    """How to continue a prompt; names and meanings are vLLM's. The engine's own parameters say how one token is chosen;
    these add what a whole text is. Raises InvalidRequest, naming the field, when a value is out of range.

        SamplingParams(temperature=0.8, top_p=0.95, max_tokens=200, n=3, stop=["\\n\\n"], seed=1)
    """

    n: int = 1
    """Samples of each prompt. With a seed they use seed, seed + 1, ...: each is what it would be alone."""
    best_of: int | None = None
    """Generate so many and return the `n` of the highest cumulative log-probability, best first."""
    max_tokens: int = 16
    """0 only reads the prompt, for its log-probabilities."""
    stop: str | Sequence[str] = ()
    """Texts that end the output, and are no part of it."""
    stop_token_ids: Sequence[int] = ()
    """Further tokens that end the output, beside those that the model's own configuration names."""
    ignore_eos: bool = False
    """Go on over the tokens with which the model ends a text."""
    logprobs: int | None = None
    """Report each token's log-probability, and this many of the most likely ones."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; it is then read in full."""
    structured_outputs: StructuredOutput | None = None
    """What form the text must have."""
    priority: int = 0
    """Lower goes first."""
    deadline: float | None = None
    """Seconds after which the answer is of no use: an output that has not begun by then is "expired"."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    """Leave tokens such as the end of a turn out of the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("n", self.n, 1, MAX_SAMPLES)
        if self.best_of is not None:
            _check_count("best_of", self.best_of, self.n, MAX_SAMPLES)
        if self.num_samples > 1 and self.temperature == 0:
            name = "n" if self.best_of is None else "best_of"
            raise InvalidRequest(name, "must be 1 at temperature 0, where all samples would be the same")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 0, MAX_LOGPROBS)
        if not isinstance(self.max_tokens, int) or self.max_tokens < 0:
            raise InvalidRequest("max_tokens", "must be a count of at least 0")
        if self.max_tokens and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens", "must not be more than max_tokens")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise InvalidRequest("stop", "must be a string or strings, none of them empty")
        if not all(isinstance(token, int) for token in self.stop_token_ids):
            raise InvalidRequest("stop_token_ids", "must be token ids")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutput):
            raise InvalidRequest("structured_outputs", "must be a StructuredOutput")

    @property
    def num_samples(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def ranks_samples(self) -> bool:
        """Whether more samples are made than are returned."""
        return self.num_samples > self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def stop_ids(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """All tokens that end the output; `eos_ids` are the model's own."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else eos_ids)

    def token_sampling(self, index: int = 0) -> TokenSampling:
        """What the engine needs for the sample of that index."""
        values = {each.name: getattr(self, each.name) for each in fields(TokenSampling)}
        sampling = TokenSampling(**values)
        if self.seed is None or index == 0:
            return sampling
        # Seeds are 64 bits with a sign: after the highest comes the lowest.
        return replace(sampling, seed=(self.seed + index + SEEDS // 2) % SEEDS - SEEDS // 2)


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"must be a count between {low} and {high}")
