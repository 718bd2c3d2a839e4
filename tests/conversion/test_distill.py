"""Whole training runs of tiny converted models: what they write, that they learn, and that nothing is lost."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unspool.errors import UserError
from unspool.loading import load
from unspool_conversion.convert import convert
from unspool_conversion.distillation.adapter import apply_adapter, describe_base
from unspool_conversion.distillation.distill import DistillOptions, check_teacher, distill, run_directory
from unspool_conversion.distillation.output import StoredModel
from unspool_conversion.distillation.recipe_files import parse_recipe
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.reports import load_report
from unspool_conversion.sources import open_source
from unspool_conversion.teacher_config import translate_config

SaveTeacher = Callable[..., Path]
StoredTensors = Callable[[Path], dict[str, torch.Tensor]]

BANK = "{kind: bank}"
LAYERWISE = "{kind: layerwise, steps: 4, batch: 2, least_bias: -4, evaluations: 2}"
LOGITS = """{kind: logits, steps: 5, batch: 2, lora: [q_proj, v_proj], lora_lr: 0.01, window_dropout: 0.5,
  dropout_windows: [4, 8], warmup: 1, gradient_noise: 0.001}"""
VERB = """
import argparse, sys
import torch
torch.set_num_threads(1)
from unspool_conversion.distillation.cli import add_distill
parser = argparse.ArgumentParser()
run = add_distill(parser)
try:
    run(parser.parse_args())
except KeyboardInterrupt:
    sys.exit(130)
"""


def recipe_text(*stages: str, **fields: Any) -> str:
    values = {"name": "tiny", "length": 96, "sequences": 7, "held_out": 1} | fields
    lines = [f"{key}: {value}" for key, value in values.items()]
    return "\n".join([*lines, "lora: {rank: 2, alpha: 4}", "stages:", *(f"- {stage}" for stage in stages)])


@pytest.fixture
def make_model(save_teacher: SaveTeacher, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A teacher and its conversion."""

    def make(dtype: torch.dtype = torch.float32, teacher: dict[str, Any] | None = None, **fields: Any) -> Any:
        source = save_teacher(dtype=dtype, **(teacher or {}))
        destination = tmp_path / f"{source.name}-converted"
        defaults: dict[str, Any] = {
            "window": PerLayer(16, ()),
            "calibration": CalibrationOptions(sequences=2, length=128),
        }
        convert(ConvertOptions(source=str(source), destination=destination, **defaults | fields))
        return source, destination

    return make


def options(model: tuple[Path, Path], destination: Path, text: Path, recipe: str, **fields: Any) -> DistillOptions:
    source, converted = model
    return DistillOptions(
        model=converted,
        destination=destination,
        teacher=str(source),
        recipe=parse_recipe(recipe, "recipe"),
        texts=(str(text),),
        **fields,
    )


def test_a_run_writes_a_model_an_adapter_and_a_report(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, destination = make_model(), tmp_path / "out"
    distill(options(model, destination, text, recipe_text(LAYERWISE, LOGITS)))
    assert not run_directory(destination).exists()
    before, after = stored_tensors(model[1]), stored_tensors(destination)
    assert before.keys() == after.keys()
    changed = {name.split(".")[4] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"q_proj", "v_proj", "far"}
    report = load_report(destination)
    block = report["distillation"]
    assert report["exact_tokens"] == 0 and report["name"] == "out"
    assert block["recipe"]["name"] == "tiny" and block["seed"] == 0
    assert block["tokens"] == 3 * 4 * 2 * 96 + 5 * 2 * 96
    assert 0 < block["trained_share"] < 0.5 and block["seconds"] > 0
    assert [layer["layer"] for layer in block["stages"][0]["layers"]] == [0, 1, 2]
    assert all(layer["error_after"] <= layer["error_before"] for layer in block["stages"][0]["layers"])
    assert {"held_out_before", "held_out_after", "last_loss"} < block["stages"][1].keys()
    lines = [json.loads(line) for line in (destination / "loss.jsonl").read_text().splitlines()]
    assert [(line["stage"], line.get("layer"), line["step"]) for line in lines] == [
        *((0, layer, step) for layer in range(3) for step in range(4)),
        *((1, None, step) for step in range(5)),
    ]
    assert (destination / "loss.png").read_bytes().startswith(b"\x89PNG")
    files = {path.name for path in (destination / "adapter").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "far.safetensors",
        "recipe.yaml",
        "unspool_adapter.json",
    }
    assert parse_recipe((destination / "adapter" / "recipe.yaml").read_text(), "").to_dict() == block["recipe"]


def test_peft_loads_the_adapter_and_computes_what_the_merged_model_does(
    make_model: Callable[..., Any], tmp_path: Path, text: Path
) -> None:
    model, destination = make_model(), tmp_path / "out"
    distill(options(model, destination, text, recipe_text(LOGITS.replace("lora_lr: 0.01", "lora_lr: 0.01, far_lr: 0"))))
    adapted = PeftModel.from_pretrained(load(model[1]).model, str(destination / "adapter"))
    tokens = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, merged = adapted(tokens).logits, load(destination).model(tokens).logits
        untrained = load(model[1]).model(tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, untrained, rtol=1e-3, atol=1e-3)


def test_the_adapter_on_a_fresh_conversion_is_the_merged_model(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, destination = make_model(torch.bfloat16), tmp_path / "out"
    distill(options(model, destination, text, recipe_text(LAYERWISE, LOGITS)))
    load_trained = apply_adapter(destination / "adapter", load(model[1]).model.config, StoredModel(model[1]).load)
    fresh = stored_tensors(model[1])
    for name, tensor in stored_tensors(destination).items():
        assert torch.equal(load_trained(name), tensor) and tensor.dtype == fresh[name].dtype


def test_converting_with_the_adapter_gives_the_trained_model(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, destination = make_model(), tmp_path / "out"
    distill(options(model, destination, text, recipe_text(LAYERWISE, LOGITS)))
    source, fields = str(model[0]), {"adapter": destination / "adapter"}
    no_calibration, trained = CalibrationOptions(enabled=False), stored_tensors(destination)
    again, named = tmp_path / "again", tmp_path / "named"
    for path, layers in ((again, {}), (named, {"window": PerLayer(16, ())})):
        convert(ConvertOptions(source=source, destination=path, calibration=no_calibration, **fields | layers))
        assert all(torch.equal(tensor, trained[name]) for name, tensor in stored_tensors(path).items())
    report = load_report(again)
    assert report["adapter"] == "adapter" and report["exact_tokens"] == 0
    assert "The adapter `adapter` was applied." in (again / "README.md").read_text()
    assert "Recipe `tiny`, seed 0" in (destination / "README.md").read_text()
    with pytest.raises(UserError, match="leave one out"):
        ConvertOptions(source=source, destination=again, calibration=CalibrationOptions(text=text), **fields)
    with pytest.raises(UserError, match="was trained for a model whose linearize is"):
        other = tmp_path / "other"
        convert(ConvertOptions(source=source, destination=other, **fields | {"window": PerLayer(8, ())}))
    assert not other.exists()


def test_a_finetuned_model_comes_back_from_its_adapter(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, destination = make_model(teacher={"model_type": "qwen3", "head_dim": 16}), tmp_path / "out"
    stage = "{kind: finetune, steps: 3, weight_lr: 0.01, cross_entropy: 0.3, confidence: true}"
    distill(options(model, destination, text, recipe_text(LOGITS, stage, teacher="source")))
    before, after = stored_tensors(model[1]), stored_tensors(destination)
    changed = {name.split(".")[4] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "far"}
    load_trained = apply_adapter(destination / "adapter", load(model[1]).model.config, StoredModel(model[1]).load)
    assert all(torch.equal(load_trained(name), tensor) for name, tensor in after.items())
    load(destination)


def test_an_adapter_of_another_model_is_refused(make_model: Callable[..., Any], tmp_path: Path, text: Path) -> None:
    model, destination = make_model(), tmp_path / "out"
    distill(options(model, destination, text, recipe_text(LAYERWISE)))
    adapter = destination / "adapter"
    assert not (adapter / "adapter_config.json").exists() or (adapter / "adapter_model.safetensors").exists()
    other = make_model(window=PerLayer(24, ()))
    with pytest.raises(UserError, match="was trained for a model whose linearize is"):
        apply_adapter(adapter, load(other[1]).model.config, StoredModel(other[1]).load)
    wider = make_model(teacher={"intermediate_size": 56})
    with pytest.raises(UserError, match="whose intermediate_size is 48, and here it is 56"):
        apply_adapter(adapter, load(wider[1]).model.config, StoredModel(wider[1]).load)
    description = json.loads((adapter / "unspool_adapter.json").read_text())
    description["base"]["hidden_size"] = 8
    (adapter / "unspool_adapter.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="has been changed since"):
        apply_adapter(adapter, load(model[1]).model.config, StoredModel(model[1]).load)


@pytest.mark.parametrize(
    "teacher",
    [
        {},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
        {"model_type": "ministral", "head_dim": 8, "sliding_window": 20},
    ],
    ids=["llama", "yarn", "ministral"],
)
def test_a_plan_and_what_it_writes_are_the_same_base(
    save_teacher: SaveTeacher, tmp_path: Path, teacher: dict[str, Any]
) -> None:
    calibration = CalibrationOptions(enabled=False)
    source = str(save_teacher(**teacher))
    result = convert(ConvertOptions(source=source, destination=tmp_path / "model", calibration=calibration))
    assert describe_base(result.plan.config) == describe_base(load(tmp_path / "model").model.config)
    check_teacher(source, translate_config(open_source(source).config), result.plan.config)


def test_without_an_adapter_only_the_far_part_is_kept_and_short_texts_stay_exact(
    make_model: Callable[..., Any], tmp_path: Path, text: Path
) -> None:
    model, destination = make_model(), tmp_path / "out"
    recipe = parse_recipe(recipe_text(LAYERWISE), "recipe")
    distill(replace(options(model, destination, text, recipe_text(LAYERWISE)), recipe=replace(recipe, lora=None)))
    files = {path.name for path in (destination / "adapter").iterdir()}
    assert files == {"far.safetensors", "recipe.yaml", "unspool_adapter.json"}
    assert load_report(destination)["exact_tokens"] == 20
    teacher = AutoModelForCausalLM.from_pretrained(model[0], dtype=torch.float32).eval()
    tokens = torch.randint(0, 258, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load(destination).model(tokens).logits, teacher(tokens).logits, rtol=1e-4, atol=1e-4)


def command(model: tuple[Path, Path], destination: Path, text: Path, recipe: Path) -> list[str]:
    arguments = [model[1], destination, "--teacher", model[0], "--recipe", recipe, "--text", text]
    return [sys.executable, "-c", VERB, *map(str, arguments), "--checkpoint-seconds", "0", "--device", "cpu"]


def wait_for_lines(process: "subprocess.Popen[bytes]", log: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def trained_bits(destination: Path, stored_tensors: StoredTensors) -> dict[str, torch.Tensor]:
    adapter = {f"adapter {name}": tensor for name, tensor in stored_tensors(destination / "adapter").items()}
    return stored_tensors(destination) | adapter


def test_a_stopped_run_ends_with_the_bits_of_an_unbroken_one(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, recipe = make_model(overrides={"bank": 8}), tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(BANK, LAYERWISE, LOGITS.replace("steps: 5", "steps: 15")))
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finished = subprocess.run(command(model, unbroken, text, recipe), check=True, capture_output=True, text=True)
    summary = finished.stdout.splitlines()
    assert summary[0].startswith(f"{unbroken}: ") and "parameters trained" in summary[0]
    starts = ("stage 1, bank: 3 layers", "stage 2, layerwise: 3 layers fitted", "stage 3, logits: held")
    assert all(line.startswith(start) for line, start in zip(summary[1:], starts, strict=False))
    log = run_directory(broken) / "loss.jsonl"
    # Among the banks, in the first fitted layer, in the second, and in the last stage.
    for lines, number in ((2, signal.SIGKILL), (5, signal.SIGKILL), (9, signal.SIGINT), (17, signal.SIGKILL)):
        words = command(model, broken, text, recipe) + (["--resume"] if log.exists() else [])
        process = subprocess.Popen(words, stderr=subprocess.PIPE)
        wait_for_lines(process, log, lines)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1].decode()
        assert not broken.exists()
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert f"unspool distill {model[1]} {broken}" in errors and errors.rstrip().endswith("--resume")
    subprocess.run([*command(model, broken, text, recipe), "--resume"], check=True, stderr=subprocess.DEVNULL)
    expected, actual = trained_bits(unbroken, stored_tensors), trained_bits(broken, stored_tensors)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert (broken / "loss.jsonl").read_bytes() == (unbroken / "loss.jsonl").read_bytes()
    one, other = (load_report(path)["distillation"] for path in (unbroken, broken))
    assert one | {"seconds": 0} == other | {"seconds": 0}
    assert not run_directory(broken).exists()


def test_layers_and_predictions_come_nearer_to_the_teacher(
    make_model: Callable[..., Any], tmp_path: Path, text: Path
) -> None:
    model = make_model(teacher={"initializer_range": 0.1})
    layerwise = "{kind: layerwise, steps: 40, batch: 2, least_bias: -4, lora: [v_proj, o_proj], lora_lr: 0.01}"
    logits = "{kind: logits, steps: 40, batch: 2, lora: [q_proj, v_proj, o_proj], lora_lr: 0.01, positions: far}"
    report = distill(options(model, tmp_path / "out", text, recipe_text(layerwise, logits)))
    first, second = report["distillation"]["stages"]
    assert all(layer["error_after"] < 0.8 * layer["error_before"] for layer in first["layers"])
    assert second["held_out_after"] < 0.8 * second["held_out_before"]


@pytest.mark.parametrize(
    ("preset", "stage"),
    [
        ("lolcats", "{kind: layerwise, steps: 3, state_weight: 0.5}"),
        (
            "liger-gla",
            "{kind: logits, steps: 3, lora: [q_proj], cross_entropy: 1.0, recompute: true, batch: 3, at_once: 2}",
        ),
        ("liger-gsa", "{kind: layerwise, steps: 3, lora: [q_proj, v_proj]}"),
        ("window-only", "{kind: layerwise, steps: 3, lora: [v_proj]}"),
    ],
)
def test_every_published_layer_can_be_trained(
    make_model: Callable[..., Any],
    tmp_path: Path,
    text: Path,
    stored_tensors: StoredTensors,
    preset: str,
    stage: str,
) -> None:
    model, destination = make_model(preset=preset), tmp_path / "out"
    distill(options(model, destination, text, recipe_text(stage)))
    before, after = stored_tensors(model[1]), stored_tensors(destination)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    load(destination)


def test_recomputing_and_smaller_parts_of_a_batch_change_no_gradient(
    make_model: Callable[..., Any], tmp_path: Path, text: Path
) -> None:
    model = make_model()
    norms = []
    for number, fields in enumerate(("at_once: 4", "at_once: 1", "at_once: 3, recompute: true")):
        stage = f"{{kind: logits, steps: 1, batch: 4, lora: [q_proj], {fields}}}"
        distill(options(model, tmp_path / f"out{number}", text, recipe_text(stage)))
        norms.append(json.loads((tmp_path / f"out{number}" / "loss.jsonl").read_text())["norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4) and norms[0] > 0


@pytest.mark.parametrize("kind", ["layerwise", "logits"])
def test_noise_of_no_variance_changes_no_bit_and_other_noise_does(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors, kind: str
) -> None:
    model, results = make_model(), []
    for number, noise in enumerate(("", ", gradient_noise: 0.0", ", gradient_noise: 0.5")):
        stage = f"{{kind: {kind}, steps: 3, evaluations: 3{noise}}}"
        destination = tmp_path / f"out{number}"
        distill(options(model, destination, text, recipe_text(stage)))
        results.append((destination / "loss.jsonl").read_text())
    assert results[0] == results[1] != results[2]


def test_a_layer_with_a_bank_is_trained_around_it(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, destination = make_model(overrides={"bank": 8}), tmp_path / "out"
    report = distill(options(model, destination, text, recipe_text(LAYERWISE, LOGITS)))
    assert all("error_after" in layer for layer in report["distillation"]["stages"][0]["layers"])
    before, after = stored_tensors(model[1]), stored_tensors(destination)
    for name, tensor in after.items():
        if ".far." in name:
            assert torch.equal(tensor, before[name]) == (".bank." in name)


def test_a_bank_is_fitted_to_all_of_the_text(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, results = make_model(overrides={"bank": 8}, teacher={"initializer_range": 0.3}), []
    for number, sequences in enumerate((6, 6, 1)):
        destination = tmp_path / f"out{number}"
        report = distill(options(model, destination, text, recipe_text(f"{{kind: bank, sequences: {sequences}}}")))
        assert report["distillation"]["tokens"] == 3 * 96 * sequences
        assert report["exact_tokens"] == load_report(model[1])["exact_tokens"] > 0
        stage = report["distillation"]["stages"][0]
        found, layers = stage["divergence_by_aging_scale"], stage["layers"]
        assert len(found) == 5 and found[str(stage["aging_scale"])] == min(found.values())
        assert all(0 < layer["bank_error_of_longer_window"] <= 1 for layer in layers)
        assert any(aging > 0 for layer in layers for aging in layer["bank_aging"])
        records = [json.loads(line) for line in (destination / "loss.jsonl").read_text().splitlines()]
        assert [(record["layer"], record["loss"]) for record in records] == [
            (layer["layer"], layer["bank_error_of_longer_window"]) for layer in layers
        ]
        results.append(stored_tensors(destination))
    before = stored_tensors(model[1])
    changed = {name.split(".far.")[-1] for name, tensor in results[0].items() if not torch.equal(tensor, before[name])}
    assert {"bank.weight"} <= changed <= {"bank.weight", "bank.aging", "bias", "gate_bias"}
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert any(not torch.equal(tensor, results[2][name]) for name, tensor in results[0].items())


def test_a_bank_stage_says_when_there_is_no_bank(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = distill(options(make_model(), tmp_path / "out", text, recipe_text("{kind: bank}")))
    assert "no layer has a bank" in caplog.text and report["distillation"]["tokens"] == 0


def test_the_seed_decides(
    make_model: Callable[..., Any], tmp_path: Path, text: Path, stored_tensors: StoredTensors
) -> None:
    model, bits = make_model(), []
    for number, seed in enumerate((1, 1, 2)):
        destination = tmp_path / f"out{number}"
        distill(options(model, destination, text, recipe_text(LOGITS, seed=seed)))
        bits.append(stored_tensors(destination)["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(bits[0], bits[1]) and not torch.equal(bits[0], bits[2])
