"""Choosing the next token from logits, one request at a time. Knows no batch: what others sample cannot change it."""

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.constraint import Constraint, ConstraintFailed
from unspool.requests import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: float32 logits divided by it would only overflow towards the same token."""

Scores = NDArray[np.float32]
Tokens = NDArray[np.int64]


class Sampler:
    """One request's sampling: its token counts, its random numbers, and what its text may be.

    In vLLM's order: repetition penalty (over prompt and generated tokens), presence and frequency penalties (generated
    tokens only), logit bias, what `constraint` and `min_tokens` forbid, temperature, min-p, top-k, top-p. Each filter
    sees what the one before it kept; of equally likely tokens the lower id is preferred.

    `stop_ids` cannot be chosen before `min_tokens` tokens were, unless the constraint allows nothing else. The
    constraint is the sampler's own: it advances with each choice.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        *,
        stop_ids: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
    ) -> None:
        self._params = params
        self._constraint = constraint
        self.seed = params.seed if params.seed is not None else secrets.randbits(63)
        """What its random numbers come from. With it and the tokens chosen so far, `replay` makes an equal sampler."""
        self._random = np.random.PCG64(self.seed % (1 << 64))
        self._uniform = np.random.Generator(self._random)
        self._num_chosen = 0
        self._seen = np.zeros(vocab_size, dtype=np.bool_) if params.repetition_penalty != 1.0 else None
        if self._seen is not None:
            self._seen[list(prompt)] = True
        penalises_counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._counts = np.zeros(vocab_size, dtype=np.float32) if penalises_counts else None
        self._biased = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._stops = np.array([token for token in stop_ids if 0 <= token < vocab_size], dtype=np.int64)

    @property
    def finished(self) -> bool:
        """Whether the constraint lets nothing follow: the generation has ended."""
        return self._constraint is not None and self._constraint.finished

    def sample(self, logits: Tensor) -> int:
        """The next token, from logits [vocab] of any float dtype and device; they are not changed.

        Of equal logits greedy choice takes the lowest id. A random choice consumes one random number, drawn on the
        CPU, so a seed gives the same tokens on every device. Raises FloatingPointError when no finite logit is largest,
        ConstraintFailed when the constraint cannot say what is allowed.
        """
        scores = self._adjust(logits.detach().float().cpu().numpy())
        token = int(scores.argmax())
        if not np.isfinite(scores[token]):
            if self._constraint is not None and scores[token] == -np.inf:
                raise ConstraintFailed("the model gives every token that the structured output allows no probability")
            raise FloatingPointError(
                f"the model's largest logit is {scores[token]}: its weights or state are damaged, "
                "or its dtype is too narrow (try float32)"
            )
        if self._params.temperature >= GREEDY_BELOW:
            token = self._draw(scores)
        self._count((token,))
        return token

    def replay(self, generated: Sequence[int]) -> None:
        """Makes a new sampler continue as the one with the same seed did that chose these tokens.

        Raises ConstraintFailed when the constraint does not allow them.
        """
        assert self._num_chosen == 0, "only a new sampler can replay"
        self._count(generated)
        if self._params.temperature >= GREEDY_BELOW:
            self._random.advance(len(generated))

    def _adjust(self, logits: Scores) -> Scores:
        """Penalties, bias and what is forbidden; a copy when anything changes."""
        params = self._params
        too_early = self._num_chosen < params.min_tokens and len(self._stops) > 0
        changes = self._seen is not None or self._counts is not None or len(self._biased) > 0
        if not (changes or too_early or self._constraint):
            return logits
        scores = logits.copy()
        if self._seen is not None:
            seen = self._seen.nonzero()[0]
            known, penalty = scores[seen], np.float32(params.repetition_penalty)
            scores[seen] = np.where(known > 0, known / penalty, known * penalty)
        if self._counts is not None:
            generated = (self._counts > 0).nonzero()[0]
            penalties = np.float32(params.frequency_penalty) * self._counts[generated]
            scores[generated] = scores[generated] - penalties - np.float32(params.presence_penalty)
        scores[self._biased] += self._bias
        if self._constraint is not None:
            self._constraint.mask(scores)
        if too_early:
            self._forbid_stops(scores)
        return scores

    def _forbid_stops(self, scores: Scores) -> None:
        kept = scores[self._stops]
        scores[self._stops] = -np.inf
        # Text that is complete and cannot go on must end, however short it is.
        if self._constraint is not None and scores.max() == -np.inf:
            scores[self._stops] = kept

    def _draw(self, scores: Scores) -> int:
        """A token by its share among those that the filters keep: the inverse of their cumulative distribution."""
        tokens, weights = keep_likely(scores, self._params)
        cumulative = weights.cumsum(dtype=np.float64)
        point = self._uniform.random() * cumulative[-1]
        return int(tokens[cumulative.searchsorted(point, side="right")])

    def _count(self, tokens: Sequence[int]) -> None:
        self._num_chosen += len(tokens)
        if self._seen is not None:
            self._seen[list(tokens)] = True
        if self._counts is not None:
            np.add.at(self._counts, list(tokens), 1)
        if self._constraint is not None:
            for token in tokens:
                self._constraint.accept(token)


def keep_likely(scores: Scores, params: SamplingParams) -> tuple[Tokens, Scores]:
    """What temperature, min-p, top-k and top-p make of scores [vocab] with a finite maximum: the ids that are kept and
    weights proportional to their probabilities, at most 1."""
    highest = scores.max()
    tokens = np.arange(len(scores))
    # Top-k compares scores as they are, since dividing by the temperature may make equals of them; min-p, being
    # relative to the maximum, commutes with it.
    if 0 < params.top_k < len(scores):
        tokens = _largest(torch.from_numpy(scores), params.top_k).numpy()
        scores = scores[tokens]
    weights: Scores = np.exp((scores - highest) / np.float32(params.temperature))
    if params.min_p > 0.0:
        likely = weights >= np.float32(params.min_p)
        tokens, weights = tokens[likely], weights[likely]
    return _keep_mass(tokens, weights, params.top_p) if params.top_p < 1.0 else (tokens, weights)


def _keep_mass(tokens: Tokens, weights: Scores, top_p: float) -> tuple[Tokens, Scores]:
    """The smallest set of the most likely tokens that holds `top_p` of the weights, and theirs."""
    total = float(weights.sum(dtype=np.float64))
    # Tokens below this weight hold less than 1 - top_p together, so none is kept: that leaves few to sort.
    possible = weights >= min(total * (1.0 - top_p) / len(weights), float(weights.max()))
    tokens, weights = tokens[possible], weights[possible]
    ordered = np.sort(weights)[::-1]
    count = int((ordered.cumsum(dtype=np.float64) - ordered).searchsorted(top_p * total))
    kept = weights >= ordered[count - 1]
    # Of those that weigh as little as the last, the first have the lower ids.
    excess = np.count_nonzero(kept) - count
    kept[(weights == ordered[count - 1]).nonzero()[0][-excess or len(weights) :]] = False
    return tokens[kept], weights[kept]


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
