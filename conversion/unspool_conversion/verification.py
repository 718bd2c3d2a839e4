"""Holds a converted model against its teacher: exact inside the near set, one result for every split, and perplexity by
position beside what a window alone reaches, with the same window and with the same bytes."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from unspool.cache import UnspoolCache
from unspool.config import UnspoolConfig, linearize_block
from unspool.mixer_spec import MixerSpec
from unspool.model import UnspoolForCausalLM
from unspool.state import layer_state_specs

TOLERANCE = 1e-4
"""Largest logit difference, relative to the largest logit, that float32 rounding explains."""
GREEDY_TOKENS = 32
UNEVEN_CHUNKS = (1, 7, 64, 65, 3, 200)
POSITION_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_HEAD_BLOCK = 256

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
    logits = (each(tokens[None], use_cache=False).logits[0].split(_HEAD_BLOCK) for each in (model, teacher))
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


def window_only(model: UnspoolForCausalLM, *, equal_bytes: bool = False) -> UnspoolForCausalLM:
    """The same weights with every state removed; with `equal_bytes`, windows widened by what the states cost."""
    config = model.config
    layers = {
        layer: {"join": "window", "window": _equal_bytes_window(config, spec) if equal_bytes else spec.window}
        for layer, spec in enumerate(config.mixer_specs())
    }
    assert config.linearize is not None
    default = MixerSpec.from_dict(config.linearize["default"])
    layer_fields = {
        layer: config.linearize.get("layers", {}).get(str(layer), {}) | fields for layer, fields in layers.items()
    }
    values = config.to_dict() | {
        "linearize": linearize_block("window-only", default, layer_fields),
        "layer_types": None,
    }
    with torch.device("meta"):
        variant = UnspoolForCausalLM(UnspoolConfig.from_dict(values))
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".far." not in name}
    variant.load_state_dict(weights, assign=True)
    variant.tie_weights()
    variant.eval()  # type: ignore[no-untyped-call]  # transformers leaves it bare
    return variant


def _equal_bytes_window(config: UnspoolConfig, spec: MixerSpec) -> int:
    dtype = torch.float32
    total = sum(tensor.num_bytes for tensor in layer_state_specs(config, spec, dtype).values())
    per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return total // per_token - spec.sinks


def score_converted(model: UnspoolForCausalLM) -> Score:
    """Scores texts with a converted model; the vocabulary-wide logits exist for a few positions at a time."""

    def score(tokens: Tensor) -> Tensor:
        hidden = model.hidden(tokens[None])[0, :-1]
        blocks = zip(hidden.split(_HEAD_BLOCK), tokens[1:].split(_HEAD_BLOCK), strict=True)
        return torch.cat([_negative_log_likelihood(model.lm_head(part), next_) for part, next_ in blocks])

    return score


def score_teacher(teacher: PreTrainedModel) -> Score:
    """Scores texts with a transformers model."""

    def score(tokens: Tensor) -> Tensor:
        logits = teacher(tokens[None], use_cache=False).logits[0, :-1]
        return _negative_log_likelihood(logits, tokens[1:])

    return score


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


def position_ranges(length: int) -> Iterator[tuple[int, int]]:
    """The ranges of positions that a text of that many tokens fills, the last one perhaps in part."""
    for low, high in zip(POSITION_EDGES, POSITION_EDGES[1:], strict=False):
        if low < length - 1:
            yield low, min(high, length)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


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
