"""Layers that keep full attention: which ones, what they compute, what a session then takes, and that it is said."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.executor import Executor, ExecutorOptions, make_executor
from unspool.loading import load
from unspool.state import layer_state_specs, state_bytes
from unspool_conversion.cli import add_convert
from unspool_conversion.convert import convert, prepare
from unspool_conversion.kept_softmax import KeptSoftmax, LayerChoice, kept_softmax, parse_layer_choice
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.reports import load_report
from unspool_kernels.native.library import available

SaveTeacher = Callable[..., Path]

CAPACITY = 48
NATIVE_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def layers_of(teacher_windows: list[int | None], **fields: Any) -> tuple[list[tuple[str, int, int, int]], Any]:
    options = ConvertOptions(source="x", destination=Path("y"), **fields)
    block = options.linearize(teacher_windows, 512)
    specs = UnspoolConfig(num_hidden_layers=len(teacher_windows), linearize=block).mixer_specs()
    return [(spec.join, spec.window, spec.sinks, spec.bank) for spec in specs], kept_softmax(block)


def options(source: Path, destination: Path, kept: str = "1", **fields: Any) -> ConvertOptions:
    defaults: dict[str, Any] = {
        "window": PerLayer(16, ()),
        "softmax_capacity": CAPACITY,
        "calibration": CalibrationOptions(length=96),
    }
    choice = parse_layer_choice(kept)
    return ConvertOptions(source=str(source), destination=destination, keep_softmax=choice, **defaults | fields)


def random_tokens(length: int) -> Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1))


def test_layers_are_chosen_by_step_or_by_number() -> None:
    assert parse_layer_choice("every:8").among(30) == (7, 15, 23)
    assert parse_layer_choice("every:1").among(3) == (0, 1, 2)
    assert parse_layer_choice("29,0, 15,0").among(30) == (0, 15, 29)


@pytest.mark.parametrize("text", ["", "every", "every:0", "every:x", "1-3", "-1", "1,,2", "1;2"])
def test_other_choices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is neither every:NUMBER nor|there is nothing below"):
        parse_layer_choice(text)


def test_a_kept_layer_sees_what_the_teacher_was_made_for_whatever_others_are_told() -> None:
    found, kept = layers_of(
        [None] * 4, keep_softmax=parse_layer_choice("every:2"), window=PerLayer(32, ((3, 3, 64),)), bank=PerLayer(8, ())
    )
    assert found == [("disjoint", 32, 4, 8), ("window", 512, 0, 0)] * 2
    assert kept == KeptSoftmax((1, 3), 512)


@pytest.mark.parametrize(("asked", "capacity"), [(300, 300), (4096, 512)])
def test_a_kept_layer_sees_less_if_asked_and_never_more(asked: int, capacity: int) -> None:
    found, kept = layers_of([None, None], keep_softmax=LayerChoice(None, (0,)), softmax_capacity=asked)
    assert found == [("window", capacity, 0, 0), ("disjoint", 256, 4, 0)]
    assert kept == KeptSoftmax((0,), capacity) and kept.names == "layer 0"


def test_a_window_of_the_teachers_own_is_kept_and_is_no_full_attention() -> None:
    found, kept = layers_of([400, 400, None], keep_softmax=LayerChoice(None, (0,)))
    assert [layer[:2] for layer in found] == [("window", 400), ("disjoint", 256), ("disjoint", 256)]
    assert kept is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_softmax": LayerChoice(None, (1, 2))}, "layer 2 does not exist; the model has layers 0 to 1"),
        ({"keep_softmax": LayerChoice(3, ())}, "every:3 keeps none of the model's 2 layers"),
        ({"softmax_capacity": 300}, "--softmax-capacity is of the layers that --keep-softmax names"),
        (
            {"keep_softmax": LayerChoice(None, (0,)), "softmax_capacity": 260},
            "a kept layer would see 260 tokens, and the others' near set has 260",
        ),
    ],
)
def test_impossible_choices_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layers_of([None, None], **fields)


def test_more_tokens_than_a_window_can_hold_need_a_capacity() -> None:
    choice = ConvertOptions(source="x", destination=Path("y"), keep_softmax=LayerChoice(None, (0,)))
    with pytest.raises(UserError, match="would see 2097152 tokens: window=2097152 .*; pass --softmax-capacity"):
        choice.linearize([None], 1 << 21)


def test_sessions_are_sized_for_the_capacity_and_the_model_says_so(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher()
    plain = prepare(replace(options(source, tmp_path / "x"), keep_softmax=None, softmax_capacity=None)).plan
    sizes = {
        capacity: prepare(options(source, tmp_path / "x", softmax_capacity=capacity)).plan.sizes()
        for capacity in (48, 96)
    }
    per_token = sizes[48]["teacher_cache_bytes_per_token"] // 3
    for capacity, size in sizes.items():
        assert size["softmax_bytes_per_session"] == capacity * per_token
    grown = sizes[96]["state_bytes_per_session"] - sizes[48]["state_bytes_per_session"]
    assert grown == 48 * per_token
    assert "softmax_bytes_per_session" not in plain.sizes() and plain.kept_softmax is None

    result = convert(options(source, tmp_path / "out"))
    config = load(tmp_path / "out").model.config
    assert config.linearize["kept_softmax"] == {"layers": [1], "capacity": CAPACITY}
    report = load_report(tmp_path / "out")
    assert report["constant_memory"] is False and report["exact_tokens"] == 20
    assert report["sizes"]["state_bytes_per_session"] == state_bytes(config, torch.float32)
    specs = layer_state_specs(config, config.mixer_specs()[1], torch.float32)
    assert sum(spec.num_bytes for spec in specs.values()) == report["sizes"]["softmax_bytes_per_session"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**It is not constant-memory**" in card and f"over {CAPACITY} tokens is kept in layer 1" in card
    assert "do not grow" not in card and "at any length" not in card
    assert f"bytes of state per session, sized for {CAPACITY} tokens" in card
    executor = make_executor(load(tmp_path / "out").model, ExecutorOptions(backend="torch"))
    assert executor.new_pool(3).num_bytes == 3 * result.plan.sizes()["state_bytes_per_session"]

    convert(replace(options(source, tmp_path / "plain"), keep_softmax=None, softmax_capacity=None))
    assert load_report(tmp_path / "plain")["constant_memory"] is True
    assert "do not grow" in (tmp_path / "plain" / "README.md").read_text()


def test_kept_layers_are_the_teachers_up_to_their_capacity_and_slide_from_there(
    save_teacher: SaveTeacher, tmp_path: Path
) -> None:
    source = save_teacher(num_hidden_layers=2, initializer_range=0.1)
    convert(options(source, tmp_path / "out", "every:1"))
    assert load_report(tmp_path / "out")["exact_tokens"] == CAPACITY
    teacher = AutoModelForCausalLM.from_pretrained(source).eval()
    config = MistralConfig(**teacher.config.to_dict() | {"sliding_window": CAPACITY, "model_type": "mistral"})
    config._attn_implementation = "eager"
    sliding = MistralForCausalLM(config).eval()
    sliding.load_state_dict(teacher.state_dict())
    tokens = random_tokens(120)[None]
    with torch.no_grad():
        ours, full, slid = load(tmp_path / "out").model(tokens).logits, teacher(tokens).logits, sliding(tokens).logits
    torch.testing.assert_close(ours[:, :CAPACITY], full[:, :CAPACITY], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, slid, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[:, CAPACITY:], full[:, CAPACITY:], rtol=1e-3, atol=1e-3)


def read(executor: Executor, tokens: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits of every token, read in pieces that end at these positions."""
    pool, rows, start = executor.new_pool(1), [], 0
    for end in [*cuts, len(tokens)]:
        rows.append(executor.logits([tokens[start:end].tolist()], pool, [0], "every").clone())
        start = end
    return torch.cat(rows)


@pytest.mark.parametrize("kept", ["1", "every:2"])
def test_kept_layers_beside_states_read_any_split_the_same_on_every_backend(
    save_teacher: SaveTeacher, tmp_path: Path, kept: str
) -> None:
    source = save_teacher(num_hidden_layers=4, initializer_range=0.15, **NATIVE_SIZES)
    convert(options(source, tmp_path / "out", kept))
    tokens = random_tokens(130)
    backends: list[Literal["torch", "native"]] = ["torch", "native"] if available() else ["torch"]
    whole = load(tmp_path / "out").model(tokens[None]).logits[0].detach()
    for backend in backends:
        executor = make_executor(load(tmp_path / "out").model, ExecutorOptions(backend=backend))
        for cuts in ([], [16, 20, 21, 47, 48, 49, 100], range(1, 130)):
            torch.testing.assert_close(read(executor, tokens, cuts), whole, rtol=1e-3, atol=1e-3)


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    verb = add_convert(parser)
    return verb(parser.parse_args([str(argument) for argument in arguments]))


def test_the_verb_says_what_a_session_takes(
    save_teacher: SaveTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_teacher()
    flags = ["--window", "16", "--keep-softmax", "0,2", "--softmax-capacity", "100", "--no-calibrate"]
    assert run(source, tmp_path / "out", *flags, "--dry-run") == 0
    softmax = 2 * 100 * 2 * 2 * 8 * 4
    printed = " ".join(capsys.readouterr().out.split())
    assert "bytes, sized for 100 tokens" in printed and "at any length" not in printed
    assert f"not constant-memory {softmax:,} bytes for full attention in layers 0, 2" in printed
    assert run(source, tmp_path / "out", *flags) == 0
    said = f"not constant-memory: {softmax:,} of these bytes are for full attention over 100 tokens in layers 0, 2"
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(source, tmp_path / "other", "--keep-softmax", "some")
    assert "is neither every:NUMBER nor layers" in capsys.readouterr().err


def test_the_other_layers_are_trained_around_kept_ones(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.jsonl"
    recipe.write_text(
        "{name: tiny, length: 64, sequences: 5, lora: {rank: 2}, stages: ["
        "{kind: layerwise, steps: 4, least_bias: -4}, {kind: logits, steps: 2, lora: [q_proj]}]}"
    )
    characters = torch.randint(97, 123, (9, 70), generator=torch.Generator().manual_seed(0))
    text.write_text("\n".join(json.dumps({"text": "".join(map(chr, row))}) for row in characters.tolist()))
    flags = ["--window", "16", "--calibration-length", "64", "--keep-softmax", "1", "--softmax-capacity", "100"]
    assert run(save_teacher(), tmp_path / "out", *flags, "--recipe", recipe, "--data", text) == 0
    report = load_report(tmp_path / "out")
    assert report["constant_memory"] is False
    first, kept, last = report["distillation"]["stages"][0]["layers"]
    assert "error_after" in first and "error_after" in last
    assert kept["skipped"] == "nothing to train on, or nothing to train"
    assert kept_softmax(load(tmp_path / "out").model.config.linearize) == KeptSoftmax((1,), 100)
