"""Holds a converted model against its teacher: exact inside the near set, one result for every split, and perplexity by
position."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unspool.cache import UnspoolCache
from unspool.model import UnspoolForCausalLM
from unspool_conversion.evaluation.positions import position_ranges
from unspool_conversion.evaluation.readers import (
    HEAD_BLOCK,
    ConvertedReader,
    TeacherReader,
    negative_log_likelihood,
)

TOLERANCE = 1e-4
"""Largest logit difference, relative to the largest logit, that float32 rounding explains."""
GREEDY_TOKENS = 32
UNEVEN_CHUNKS = (1, 7, 64, 65, 3, 200)

Score = Callable[[Tensor], Tensor]
"""Negative log-likelihood in nats of each token after the first: tokens [T] to [T - 1]."""


class Exactness(NamedTuple):
    """How the converted model compares with its teacher on a prompt that fits the near set."""

    tokens: int
    relative_difference: float
    same_greedy_tokens: bool | None
    """None where the near set has no room for a prompt and a continuation."""

    @property
    def passed(self) -> bool:
        return self.relative_difference <= TOLERANCE and self.same_greedy_tokens is not False


class Chunking(NamedTuple):
    """How far other splits of the same tokens move the logits of one prefill."""

    tokens: int
    by_steps: float
    by_uneven_chunks: float

    @property
    def passed(self) -> bool:
        return max(self.by_steps, self.by_uneven_chunks) <= TOLERANCE


@torch.inference_mode()
def check_exactness(model: UnspoolForCausalLM, teacher: PreTrainedModel, tokens: Tensor) -> Exactness:
    """Compares logits and greedy continuations on tokens [T] that fit the near set."""
    prompt, length = tokens[None], tokens.shape[0]
    expected = teacher(prompt, use_cache=False).logits
    difference = _relative_difference(model(prompt, use_cache=False).logits, expected)
    return Exactness(length, difference, _same_greedy_tokens(model, teacher, prompt))


@torch.inference_mode()
def measure_divergence(model: UnspoolForCausalLM, teacher: PreTrainedModel, tokens: Tensor) -> float:
    """KL divergence in nats a token of the converted model's predictions from the teacher's, on tokens [T]."""
    logits = (each(tokens[None], use_cache=False).logits[0].split(HEAD_BLOCK) for each in (model, teacher))
    # Rounding may make the sum of equal predictions slightly negative.
    total = sum(float(_divergence(actual, expected)) for actual, expected in zip(*logits, strict=True))
    return max(total / tokens.shape[0], 0.0)


@torch.inference_mode()
def check_chunking(model: UnspoolForCausalLM, tokens: Tensor) -> Chunking:
    """Compares one prefill of tokens [T] with single steps and with uneven chunks."""
    whole = _run_in_chunks(model, tokens, [tokens.shape[0]])
    steps = _run_in_chunks(model, tokens, [1] * tokens.shape[0])
    uneven = _run_in_chunks(model, tokens, _uneven_split(tokens.shape[0]))
    return Chunking(tokens.shape[0], _relative_difference(steps, whole), _relative_difference(uneven, whole))


def score_converted(model: UnspoolForCausalLM) -> Score:
    """Scores texts with a converted model."""
    return partial(negative_log_likelihood, ConvertedReader(model))


def score_teacher(teacher: PreTrainedModel) -> Score:
    """Scores texts with a transformers model."""
    return partial(negative_log_likelihood, TeacherReader(teacher))


@torch.inference_mode()
def perplexity_by_position(score: Score, sequences: Tensor, progress: Callable[[], object]) -> dict[str, Any]:
    """Perplexity of tokens [sequences, length] in ranges of positions, and of all: range name to perplexity.

    A token counts in the range that holds the position it is predicted from.
    """
    losses = []
    for sequence in sequences:
        losses.append(score(sequence))
        progress()
    loss = torch.stack(losses).double()
    ranges = {f"{low}-{high}": loss[:, low:high] for low, high in position_ranges(sequences.shape[1])}
    return {name: math.exp(float(part.mean())) for name, part in (ranges | {"all": loss}).items()}


def _divergence(actual: Tensor, expected: Tensor) -> Tensor:
    """KL divergence in nats of logits [T, V] from the expected ones, summed over T."""
    actual, expected = (logits.double().log_softmax(-1) for logits in (actual, expected))
    return F.kl_div(actual, expected, reduction="sum", log_target=True)


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _same_greedy_tokens(model: UnspoolForCausalLM, teacher: PreTrainedModel, tokens: Tensor) -> bool | None:
    new_tokens = min(GREEDY_TOKENS, tokens.shape[1] // 2)
    if new_tokens == 0:
        return None
    start = tokens[:, :-new_tokens]
    return torch.equal(_greedy(model, start, new_tokens), _greedy(teacher, start, new_tokens))


def _greedy(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    ids: Tensor = model.generate(  # type: ignore[operator]  # transformers types a model's generate as Tensor | Module
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return ids[:, prompt.shape[1] :]


def _uneven_split(length: int) -> list[int]:
    chunks: list[int] = []
    while (left := length - sum(chunks)) > 0:
        chunks.append(min(UNEVEN_CHUNKS[len(chunks) % len(UNEVEN_CHUNKS)], left))
    return chunks


def _run_in_chunks(model: UnspoolForCausalLM, tokens: Tensor, chunks: Sequence[int]) -> Tensor:
    cache = UnspoolCache(model.config, 1, model.dtype, model.device)
    parts = [model(part[None], past_key_values=cache, use_cache=True).logits[0] for part in tokens.split(list(chunks))]
    return torch.cat(parts)
