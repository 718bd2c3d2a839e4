"""Trains tiny models on multi-query associative recall (Zoology, arXiv 2312.04927): can this mixer learn to recall?

It says nothing of a converted model's weights: it tells a layer that cannot remember from one that was not taught to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.config import UnspoolConfig, linearize_block
from unspool.mixer_spec import MixerSpec
from unspool.model import UnspoolForCausalLM
from unspool_conversion.evaluation.bootstrap import Bootstrap
from unspool_conversion.evaluation.likelihood import as_record
from unspool_conversion.evaluation.variants import CONVERTED, EQUAL_BYTES, TEACHER, WINDOW_ONLY, equal_bytes_window

POWER = 0.01
"""Of the law by which queries are near their pairs more often than far."""
LAYERS = 2
HEADS = 2
INITIALIZER_RANGE = 0.08
"""Tiny layers that begin nearer to zero take several times the steps."""
WINDOW = 2
"""Tokens, so that most pairs are out of the reach of the windows of all layers together."""


@dataclass(frozen=True, kw_only=True)
class MqarOptions:
    """Keys are the lower half of the vocabulary, values the upper one."""

    vocabulary: int = 64
    length: int = 32
    pairs: int = 4
    hidden: int = 64
    batch: int = 64
    steps: int = 600
    learning_rate: float = 3e-3
    test_sequences: int = 256
    seed: int = 0


class MqarBatch(NamedTuple):
    """inputs [B, T]; of each query its position, its pair's position and its value, each [B, pairs]."""

    inputs: Tensor
    queries: Tensor
    pairs: Tensor
    values: Tensor


def draw_mqar(options: MqarOptions, count: int, generator: torch.Generator) -> MqarBatch:
    """Pairs of different keys and values, then every key once more among random tokens."""
    half, context = options.vocabulary // 2, 2 * options.pairs
    keys = torch.rand(count, half, generator=generator).argsort(1)[:, : options.pairs]
    values = half + torch.rand(count, half, generator=generator).argsort(1)[:, : options.pairs]
    slots = (options.length - context) // 2
    law = torch.arange(1, slots + 1, dtype=torch.float64) ** (POWER - 1.0)
    queries = context + 2 * torch.multinomial(law.expand(count, -1), options.pairs, generator=generator)
    inputs = torch.randint(options.vocabulary, (count, options.length), generator=generator)
    inputs[:, :context] = torch.stack([keys, values], dim=-1).flatten(1)
    inputs.scatter_(1, queries, keys)
    pairs = (2 * torch.arange(options.pairs)).expand(count, -1)
    return MqarBatch(inputs, queries, pairs, values)


def train_mqar(
    spec: MixerSpec, options: MqarOptions | None = None, progress: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Trains two layers of that mixer and tests them on new texts: the accuracy on queries whose pair is beyond the
    reach of a WINDOW in both layers, as an interval. `progress` is called once a step."""
    options = options or MqarOptions()
    # The caller's own random numbers are as they were.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(options.seed)
        model = UnspoolForCausalLM(_config(spec, options))
        _start_even(model)
        _train(model, options, progress)
    return _test(model, options)


def measure_mqar_training(
    spec: MixerSpec, options: MqarOptions, progress: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Rows for a layer with a state: it, full softmax in place of the teacher, and windows of WINDOW tokens and of
    equal bytes. There is no row of the state alone: in a tiny model each layer's window is what shifts by a token."""
    small = spec.replace(window=WINDOW, sinks=0)
    window = spec.replace(join="window", sinks=0)
    specs = {
        TEACHER: window.replace(window=options.length),
        WINDOW_ONLY: window.replace(window=WINDOW),
        EQUAL_BYTES: window.replace(window=equal_bytes_window(_config(small, options), small)),
        CONVERTED: small,
    }
    return {
        "window": WINDOW,
        "pairs": options.pairs,
        "length": options.length,
        "steps": options.steps,
        "chance": 1.0 / options.pairs,
        "windows": {name: each.window for name, each in specs.items()},
        "rows": {name: train_mqar(each, options, progress) for name, each in specs.items()},
    }


def num_training_steps(options: MqarOptions) -> int:
    """Of all rows of `measure_mqar_training`."""
    return 4 * options.steps


def _config(spec: MixerSpec, options: MqarOptions) -> UnspoolConfig:
    return UnspoolConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=options.hidden // HEADS,
        max_position_embeddings=options.length,
        initializer_range=INITIALIZER_RANGE,
        linearize=linearize_block("mqar", spec, {}),
    )


@torch.no_grad()
def _start_even(model: UnspoolForCausalLM) -> None:
    """Weighs a token in the state as one in the window, where the far part has a weight: a converted layer's is almost
    off at the start, and hundreds of steps would go into turning it on."""
    for mixer in (layer.self_attn for layer in model.model.layers):
        if hasattr(mixer.far, "bias"):
            query = torch.zeros(1, 1, mixer.far.bias.numel(), 1, model.config.head_dim)
            weight = mixer.far.query_features(query)[0, 0, 0, 0] @ mixer.far.key_features(query[..., 0, :])[0, 0, 0]
            mixer.far.bias.fill_(-float(weight.log()))


def _train(model: UnspoolForCausalLM, options: MqarOptions, progress: Callable[[], object]) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.1
    )
    for _ in range(options.steps):
        batch = draw_mqar(options, options.batch, generator)
        loss = F.cross_entropy(_predict(model, batch).flatten(0, 1), batch.values.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress()


def _predict(model: UnspoolForCausalLM, batch: MqarBatch) -> Tensor:
    """Logits at the queries [B, pairs, V]."""
    hidden = model.hidden(batch.inputs)
    logits: Tensor = model.lm_head(hidden.gather(1, batch.queries[..., None].expand(-1, -1, hidden.shape[-1])))
    return logits


@torch.inference_mode()
def _test(model: UnspoolForCausalLM, options: MqarOptions) -> dict[str, Any]:
    model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it bare
    generator = torch.Generator().manual_seed(options.seed + 1)
    batch = draw_mqar(options, options.test_sequences, generator)
    right = (_predict(model, batch).argmax(-1) == batch.values).double()
    beyond = batch.queries - batch.pairs > LAYERS * WINDOW
    accuracy = Bootstrap(range(options.test_sequences)).mean(right, beyond)
    return {"accuracy": as_record(accuracy), "queries": int(beyond.sum())}
