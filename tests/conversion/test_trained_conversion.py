"""`convert --recipe`: one command from a source to a trained model, its record, and how it is stopped and resumed."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unspool.errors import UserError
from unspool.loading import load
from unspool_conversion.cli import add_convert
from unspool_conversion.convert import convert
from unspool_conversion.distillation.distill import DistillOptions, distill
from unspool_conversion.distillation.recipe_files import read_recipe
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.reports import load_report
from unspool_conversion.trained_conversion import work_directory

SaveTeacher = Callable[..., Path]
StoredTensors = Callable[[Path], dict[str, torch.Tensor]]

RECIPE = """
name: tiny
length: 96
sequences: 7
lora: {rank: 2, alpha: 4}
stages:
- {kind: layerwise, steps: 3, batch: 2, least_bias: -4, evaluations: 2}
- {kind: logits, steps: STEPS, batch: 2, lora: [q_proj, v_proj], window_dropout: 0.5, dropout_windows: [8]}
"""
QUICK = ("--calibration-length", "64", "--window", "16", "--device", "cpu")
VERB = """
import argparse, sys
import torch
torch.set_num_threads(1)
from unspool_conversion.cli import add_convert
parser = argparse.ArgumentParser()
run = add_convert(parser)
try:
    run(parser.parse_args())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("STEPS", "4"))
    return path


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    convert = add_convert(parser)
    return convert(parser.parse_args([str(argument) for argument in arguments]))


def test_one_command_writes_what_three_would(
    save_teacher: SaveTeacher,
    tmp_path: Path,
    text: Path,
    recipe: Path,
    stored_tensors: StoredTensors,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, destination = save_teacher(dtype=torch.bfloat16), tmp_path / "models" / "out"
    assert run(source, destination, *QUICK, "--recipe", recipe, "--data", text, "--max-shard-size", "30KB") == 0
    assert sorted(path.name for path in destination.parent.iterdir()) == ["out"]
    by_hand, window = tmp_path / "by-hand", PerLayer(16, ())
    calibration = CalibrationOptions(length=64)
    convert(ConvertOptions(source=str(source), destination=by_hand, window=window, calibration=calibration))
    trained = tmp_path / "trained"
    distill(
        DistillOptions(
            model=by_hand,
            destination=trained,
            teacher=str(source),
            recipe=read_recipe(str(recipe)),
            texts=(str(text),),
        )
    )
    expected, actual = stored_tensors(trained), stored_tensors(destination)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert (destination / "model.safetensors.index.json").is_file()
    report, known = load_report(destination), load_report(trained)
    assert report["name"] == "out" and report["exact_tokens"] == 0 and "adapter" not in report
    assert report["calibration"] == known["calibration"] and report["calibration"]["enabled"]
    assert report["distillation"] | {"seconds": 0} == known["distillation"] | {"seconds": 0}
    assert {"recipe", "seed", "seconds", "tokens", "trained_share"} < report["distillation"].keys()
    assert {"adapter", "loss.jsonl", "loss.png"} < {path.name for path in destination.iterdir()}
    assert "Recipe `tiny`, seed 0" in (destination / "README.md").read_text()
    assert (
        f"recipe tiny, seed 0: {report['distillation']['trained_parameters']:,} parameters" in capsys.readouterr().out
    )
    load(destination)


def test_what_is_trained_can_be_written_in_any_format(
    save_teacher: SaveTeacher, tmp_path: Path, text: Path, recipe: Path, stored_tensors: StoredTensors
) -> None:
    source, destination, again = save_teacher(hidden_size=64), tmp_path / "out", tmp_path / "again"
    assert run(source, destination, *QUICK, "--recipe", recipe, "--data", text, "--quant", "int8", "--seed", "5") == 0
    assert load(destination).stored_as == "int8"
    assert load_report(destination)["distillation"]["seed"] == 5
    assert run(source, again, "--window", "16", "--adapter", destination / "adapter", "--quant", "int8") == 0
    expected = stored_tensors(again)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored_tensors(destination).items())


def test_a_dry_run_says_what_would_be_trained(
    save_teacher: SaveTeacher, tmp_path: Path, text: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_teacher()
    before = sorted(tmp_path.rglob("*"))
    assert run(source, tmp_path / "new" / "out", *QUICK, "--recipe", recipe, "--data", text, "--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = " ".join(capsys.readouterr().out.split())
    assert "an estimate without the training" in printed
    assert f"training recipe tiny (layerwise, logits), {3 * 3 * 2 * 96 + 4 * 2 * 96:,} tokens read" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "magic", "--data", "TEXT"], "recipe 'magic' is neither a file nor one of"),
        (["--recipe", "RECIPE"], "recipe 'tiny' names no text to train on; pass --data"),
        (["--recipe", "RECIPE", "--data", "nothing.txt"], "nothing.txt does not exist"),
        (["--recipe", "RECIPE", "--data", "SHORT"], "the text fills 0 windows of 96 tokens"),
        (["--recipe", "RECIPE", "--data", "TEXT", "--window", "200"], "never leave a near set of 204"),
        (["--recipe", "RECIPE", "--data", "TEXT", "--seed", "-1"], "--seed: -1 is not a whole number"),
        (["--recipe", "RECIPE", "--data", "TEXT", "--resume"], "holds no conversion to resume"),
        (["--recipe", "RECIPE", "--data", "TEXT", "--adapter", "FOLDER"], "--adapter brings what --recipe would train"),
        (["--recipe", "RECIPE", "--data", "TEXT", "--preset", "magic"], "invalid choice"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    save_teacher: SaveTeacher,
    tmp_path: Path,
    text: Path,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A thread.")
    places = {"TEXT": str(text), "RECIPE": str(recipe), "SHORT": str(short), "FOLDER": str(tmp_path)}
    source = save_teacher()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("unspool_conversion.trained_conversion.convert", lambda *_: pytest.fail("converted"))
    with pytest.raises((UserError, SystemExit)) as refused:
        run(source, tmp_path / "new" / "out", *QUICK, *(places.get(word, word) for word in arguments))
    assert message in f"{refused.value} {capsys.readouterr().err}"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--data", "x.txt"], ["--seed", "0"], ["--device", "cpu"], ["--resume"]])
def test_how_to_train_needs_a_recipe(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(UserError, match=f"{arguments[0]} says how to train, and there is no --recipe"):
        run(tmp_path / "source", tmp_path / "out", *arguments)


def test_a_conversion_that_fails_before_training_leaves_nothing(
    save_teacher: SaveTeacher, tmp_path: Path, text: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    source = save_teacher()
    monkeypatch.setattr("unspool_conversion.convert.write_shards", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        run(source, tmp_path / "new" / "out", *QUICK, "--recipe", recipe, "--data", text)
    assert not (tmp_path / "new").exists()


def test_a_stopped_conversion_goes_on_and_ends_with_the_same_bits(
    save_teacher: SaveTeacher, tmp_path: Path, text: Path, recipe: Path, stored_tensors: StoredTensors
) -> None:
    recipe.write_text(RECIPE.replace("STEPS", "40"))
    source, unbroken, broken = save_teacher(), tmp_path / "unbroken", tmp_path / "broken"
    arguments = [*QUICK, "--recipe", str(recipe), "--data", str(text)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", VERB, str(source)]
    subprocess.run([*command, str(unbroken), *arguments], check=True, capture_output=True, env=environment)
    work = work_directory(broken)
    log = work / "trained.distilling" / "loss.jsonl"
    # In the first layer, and in the second stage.
    for lines, number in ((1, signal.SIGINT), (14, signal.SIGTERM)):
        words = [*command, str(broken), *arguments, *(["--resume"] if work.exists() else [])]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, env=environment)
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 130 and errors.rstrip().endswith(
            "the same command with --resume goes on from there"
        )
        assert not broken.exists() and work.exists()
    with pytest.raises(UserError, match="holds a conversion that was stopped; pass --resume"):
        run(source, broken, *arguments)
    with pytest.raises(UserError, match="is a conversion with another window; resume it with the one it had"):
        run(source, broken, *arguments, "--resume", "--window", "24")
    with pytest.raises(UserError, match="is a conversion with another recipe"):
        run(source, broken, *arguments, "--resume", "--seed", "3")
    subprocess.run([*command, str(broken), *arguments, "--resume"], check=True, capture_output=True, env=environment)
    expected, actual = stored_tensors(unbroken), stored_tensors(broken)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert (broken / "loss.jsonl").read_bytes() == (unbroken / "loss.jsonl").read_bytes()
    assert not work.exists()


def test_a_conversion_stopped_after_its_training_trains_nothing_again(
    save_teacher: SaveTeacher, tmp_path: Path, text: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = save_teacher(), tmp_path / "out"
    arguments = [*QUICK, "--recipe", recipe, "--data", text]

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("unspool_conversion.trained_conversion.write_model", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            run(source, destination, *arguments)
    assert not destination.exists()
    with monkeypatch.context() as patched:
        patched.setattr("unspool_conversion.trained_conversion.distill", lambda *_: pytest.fail("trained again"))
        assert run(source, destination, *arguments, "--resume") == 0
    assert load_report(destination)["distillation"]["recipe"]["name"] == "tiny"
    assert not work_directory(destination).exists()
