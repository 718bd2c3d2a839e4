"""The whole pipeline on what only a state can do: recall at distances beyond the window.

A byte-level teacher learns to recall from text; its conversion has a window that holds no two mentions of a key. What
is asserted is what training must have done, in nats and in recall.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unspool.loading import load
from unspool_conversion.convert import convert
from unspool_conversion.distillation.recipe_files import parse_recipe
from unspool_conversion.evaluation.variants import window_only
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.reports import load_report
from unspool_conversion.trained_conversion import TrainingOptions, convert_and_train

WINDOW = 16
NUM_KEYS = 16
"""A round names every key once, the first half of them before the second: nine pairs at least, more than a window,
stand between two mentions of a key."""
LENGTH = 192
ONE_SECTION, MANY_SECTIONS = (100, 100), (2, 3)
"""Rounds of a section, from and to. A new section draws new keys and values; the old ones no longer hold."""

RECIPE = f"""
name: recall
length: {LENGTH}
sequences: 130
held_out: 2
lora: {{rank: 8, alpha: 16}}
stages:
- {{kind: layerwise, steps: 60, batch: 4, lora: [v_proj, o_proj], least_bias: -6, evaluations: 4}}
- {{kind: logits, steps: STEPS, batch: 8, at_once: 8, lora: [q_proj, k_proj, v_proj, o_proj], positions: far}}
"""


class Ledger(NamedTuple):
    """A text of keys and values, and which of its characters are values that it named before, in the same section."""

    text: str
    recalled: list[bool]


class Scores(NamedTuple):
    """Nats a token beyond the near set, and the share of recalled values that are the likeliest token."""

    nats: float
    recall: float


def write_ledger(chance: random.Random, length: int, rounds: tuple[int, int]) -> Ledger:
    text, recalled = "", []
    while len(text) < length:
        keys = chance.sample(ascii_lowercase, NUM_KEYS)
        values = {key: chance.choice(ascii_uppercase) for key in keys}
        text, recalled = text + "\n", [*recalled, False]
        for turn in range(chance.randint(*rounds)):
            half = NUM_KEYS // 2
            keys = chance.sample(keys[:half], half) + chance.sample(keys[half:], half)
            text += "".join(key + values[key] for key in keys)
            recalled += [False, turn > 0] * NUM_KEYS
    return Ledger(text[:length], recalled[:length])


def write_ledgers(seed: int, count: int, rounds: tuple[int, int]) -> list[Ledger]:
    """One character short of a training sequence, which the end of the text fills."""
    chance = random.Random(seed)
    return [write_ledger(chance, LENGTH - 1, rounds) for _ in range(count)]


class Lesson(NamedTuple):
    """Tokens [B, T] and which of them [B, T] can be known from the text before."""

    tokens: Tensor
    known: Tensor


def copy_lessons(chance: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[Lesson]:
    """Strings that repeat: every character is a recall, which is how a model learns to recall in seconds."""
    while True:
        periods = [chance.randint(NUM_KEYS // 2, NUM_KEYS) for _ in range(32)]
        strings = ["".join(chance.choices(ascii_lowercase + ascii_uppercase, k=period)) for period in periods]
        tokens = torch.tensor(tokenizer([(string * 5)[:40] for string in strings])["input_ids"])
        yield Lesson(tokens, torch.arange(40) >= torch.tensor(periods)[:, None])


def ledger_lessons(chance: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[Lesson]:
    while True:
        ledgers = [write_ledger(chance, LENGTH, chance.choice((ONE_SECTION, MANY_SECTIONS))) for _ in range(16)]
        tokens = torch.tensor(tokenizer([ledger.text for ledger in ledgers])["input_ids"])
        yield Lesson(tokens, torch.tensor([ledger.recalled for ledger in ledgers]))


def learn(model: LlamaForCausalLM, lessons: Iterator[Lesson], loss_wanted: float, most_steps: int) -> None:
    """Trains until the loss on known tokens is as wanted, on average over the last lessons."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    mean = 5.0
    for step, lesson in enumerate(itertools.islice(lessons, most_steps)):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30)
        known = lesson.known[:, 1:]
        losses = F.cross_entropy(
            model(lesson.tokens).logits[:, :-1].transpose(1, 2), lesson.tokens[:, 1:], reduction="none"
        )
        optimizer.zero_grad()
        (losses[known].mean() + 0.1 * losses[~known].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * losses[known].mean().item()
        if mean < loss_wanted:
            return
    pytest.fail(f"the teacher has learnt nothing to distil: its loss is {mean:.3f}")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and waiting for one on a busy machine takes minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Half a million parameters that recall."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=256,
        eos_token_id=257,
    )
    model, chance = LlamaForCausalLM(config), random.Random(0)
    learn(model, copy_lessons(chance, tokenizer), 0.6, 1200)
    learn(model, ledger_lessons(chance, tokenizer), 0.02, 300)
    directory = tmp_path_factory.mktemp("recall") / "teacher"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Pipeline(NamedTuple):
    """Converts and trains on ledgers; where it puts the result."""

    teacher: Path
    directory: Path

    def options(self, name: str, **fields: Any) -> ConvertOptions:
        return ConvertOptions(
            source=str(self.teacher),
            destination=self.directory / name,
            window=PerLayer(WINDOW, ()),
            sinks=PerLayer(0, ()),
            **fields,
        )

    def train(self, name: str, rounds: tuple[int, int], steps: int, **fields: Any) -> Path:
        text = self.directory / f"{name}.jsonl"
        text.write_text("\n".join(json.dumps({"text": ledger.text}) for ledger in write_ledgers(1, 131, rounds)))
        options = self.options(name, calibration=CalibrationOptions(text=text, sequences=4, length=LENGTH), **fields)
        recipe = parse_recipe(RECIPE.replace("STEPS", str(steps)), "recipe")
        convert_and_train(options, TrainingOptions(recipe=recipe, texts=(str(text),)))
        return options.destination

    def cut(self) -> Path:
        """The teacher's weights with the window and nothing else."""
        options = self.options("window", preset="window-only")
        convert(options)
        return options.destination


@pytest.fixture(scope="module")
def pipeline(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(teacher, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def trained(pipeline: Pipeline) -> Path:
    return pipeline.train("trained", ONE_SECTION, 100)


@pytest.fixture(scope="module")
def score(tokenizer: PreTrainedTokenizerFast) -> Callable[[Any], Scores]:
    """Scores a model on held-out ledgers of one section."""
    ledgers = write_ledgers(2, 32, ONE_SECTION)
    return lambda model: score_model(model, ledgers, tokenizer)


def score_model(model: Any, ledgers: Sequence[Ledger], tokenizer: PreTrainedTokenizerFast) -> Scores:
    tokens = torch.tensor(tokenizer([ledger.text for ledger in ledgers])["input_ids"])
    recalled = torch.tensor([ledger.recalled for ledger in ledgers])[:, 1:]
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    right = logits.argmax(-1) == tokens[:, 1:]
    return Scores(nats[:, WINDOW:].mean().item(), right[recalled].float().mean().item())


def test_training_closes_the_gap_between_the_window_and_the_teacher(
    pipeline: Pipeline, trained: Path, score: Callable[[Any], Scores]
) -> None:
    ceiling = score(AutoModelForCausalLM.from_pretrained(pipeline.teacher).eval())
    floor, reached = score(load(pipeline.cut()).model), score(load(trained).model)
    assert ceiling.recall > 0.97 and floor.recall < 0.1
    assert floor.nats - ceiling.nats > 1
    assert (floor.nats - reached.nats) / (floor.nats - ceiling.nats) >= 0.8


def test_what_is_recalled_comes_out_of_the_state(trained: Path, score: Callable[[Any], Scores]) -> None:
    model = load(trained).model
    with_state, without = score(model), score(window_only(model))
    assert with_state.recall > 0.8 and without.recall < 0.1
    assert with_state.nats < without.nats


def test_both_stages_bring_the_model_nearer_to_the_teacher(trained: Path) -> None:
    layerwise, logits = load_report(trained)["distillation"]["stages"]
    assert all(layer["error_after"] < layer["error_before"] for layer in layerwise["layers"])
    assert logits["held_out_after"] < 0.5 * logits["held_out_before"]


def test_a_gate_read_from_the_keys_forgets_better_than_one_that_reads_nothing(pipeline: Pipeline) -> None:
    """On text whose sections end what held before, so that there is something to forget."""
    losses = {}
    for gate in ("scalar", "fixed"):
        model = pipeline.train(gate, MANY_SECTIONS, 60, overrides={"gate": gate})
        losses[gate] = load_report(model)["distillation"]["stages"][1]["held_out_after"]
    assert losses["scalar"] < losses["fixed"]
