"""Choosing the next token from logits, one request at a time. Knows no batch: what others sample cannot change it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unspool.requests import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: float32 logits divided by it would only overflow towards the same token."""


class Sampler:
    """One request's sampling: its token counts and its random numbers.

    In vLLM's order: repetition penalty (over prompt and generated tokens), presence and frequency penalties (generated
    tokens only), logit bias, temperature, min-p, top-k, top-p. Each filter sees what the one before it kept; of equally
    likely tokens the lower id is preferred.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool) if params.repetition_penalty != 1.0 else None
        if self._seen is not None:
            self._seen[list(prompt)] = True
        penalises_counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._counts = torch.zeros(vocab_size) if penalises_counts else None
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    def sample(self, logits: Tensor) -> int:
        """The next token, from logits [vocab] of any float dtype and device; they are not changed.

        Of equal logits greedy choice takes the lowest id. A random choice consumes one random number, drawn on the
        CPU, so a seed gives the same tokens on every device. Raises FloatingPointError when no finite logit is largest.
        """
        scores = self._adjust(logits.detach().float().cpu())
        best, token = scores.max(dim=0)
        if not best.isfinite():
            raise FloatingPointError(
                f"the model's largest logit is {best.item()}: its weights or state are damaged, "
                "or its dtype is too narrow (try float32)"
            )
        choice = int(token) if self._params.temperature < GREEDY_BELOW else self._draw(scores)
        self._count(choice)
        return choice

    def _adjust(self, logits: Tensor) -> Tensor:
        """Penalties and bias."""
        params = self._params
        if self._seen is not None:
            penalty = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._counts is not None:
            logits = logits - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)
        if len(self._biased):
            logits = logits.index_add(0, self._biased, self._bias)
        return logits

    def _draw(self, scores: Tensor) -> int:
        """A token by its share among those that the filters keep: the inverse of their cumulative distribution."""
        tokens, shares = keep_likely(scores, self._params)
        cumulative = shares.cumsum(dim=0)
        point = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
        return int(tokens[torch.searchsorted(cumulative, point, right=True)])

    def _count(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1


def keep_likely(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What temperature, min-p, top-k and top-p make of scores [vocab] with a finite maximum: the ids that are kept and
    their probabilities, float64."""
    # Top-k compares scores as they are, since dividing by the temperature may make equals of them; min-p, being
    # relative to the maximum, commutes with it.
    limited = 0 < params.top_k < len(scores)
    tokens = _largest(scores, params.top_k) if limited else torch.arange(len(scores))
    shares = ((scores[tokens] - scores.max()) / params.temperature).double().softmax(dim=0)
    likely = (shares > 0.0) & (shares >= params.min_p * shares.max())
    tokens, shares = tokens[likely], shares[likely]
    return _keep_mass(tokens, shares / shares.sum(), params.top_p)


def _keep_mass(tokens: Tensor, shares: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of the most likely tokens that holds `top_p` of the probability, and their shares of it all."""
    if top_p == 1.0:
        return tokens, shares
    # Tokens below this share hold less than 1 - top_p together, so none is kept: that leaves few to sort.
    possible = shares >= min((1.0 - top_p) / len(shares), float(shares.max()))
    tokens, shares = tokens[possible], shares[possible]
    shares, order = shares.sort(descending=True, stable=True)
    kept = shares.cumsum(dim=0) - shares < top_p
    return tokens[order[kept]], shares[kept]


def token_logprobs(logits: Tensor, token: int, top: int) -> TokenLogprobs:
    """Log-probability of `token` and of the `top` most likely tokens (best first, of equals the lower id) under
    logits [vocab] as the model gave them, computed in float32."""
    logprobs = logits.detach().float().log_softmax(dim=0)
    best = _largest(logprobs, min(top, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), tuple(zip(best.tolist(), logprobs[best].tolist(), strict=True)))


def _largest(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values, best first, of equals the lower id."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    # topk chooses freely among equals: take all that reach its last value, lowest ids first, and sort stably.
    reaching = (values >= values.topk(count).values[-1]).nonzero().squeeze(1)
    order = values[reaching].sort(descending=True, stable=True).indices
    return reaching[order[:count]]
