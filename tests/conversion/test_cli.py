"""The verb `convert`, from command line to directory."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unspool.errors import UserError
from unspool.state import state_bytes
from unspool_conversion.cli import add_convert
from unspool_conversion.options import ConvertOptions, PerLayer
from unspool_conversion.plan import plan_conversion
from unspool_conversion.reports import load_report
from unspool_conversion.sources import open_source

SaveTeacher = Callable[..., Path]
VERB = """
import argparse
from unspool_conversion.cli import add_convert
parser = argparse.ArgumentParser()
run = add_convert(parser)
run(parser.parse_args())
"""
QUICK = ("--calibration-length", "64", "--calibration-sequences", "2", "--window", "16")


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    convert = add_convert(parser)
    return convert(parser.parse_args([str(argument) for argument in arguments]))


def test_a_conversion_reports_itself(
    save_teacher: SaveTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(save_teacher(), tmp_path / "out", *QUICK) == 0
    captured = capsys.readouterr()
    sizes = load_report(tmp_path / "out")["sizes"]
    assert captured.out.startswith(f"{tmp_path / 'out'}: {sizes['parameters']:,} parameters")
    assert "calibrate" in captured.err and "write" in captured.err


def test_every_option_reaches_the_layers(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    options = ["--preset", "disjoint", "--gate", "fixed", "--feature-map", "elu", "--state-heads", "q"]
    numbers = ["--window", "24,1=48", "--sinks", "2,0-1=0", "--dtype", "bfloat16", "--no-calibrate"]
    assert run(save_teacher(), tmp_path / "out", *options, *numbers, "--max-shard-size", "30KB") == 0
    report = load_report(tmp_path / "out")
    default = report["linearize"]["default"]
    assert (default["gate"], default["feature_map"], default["state_heads"]) == ("fixed", "elu", "q")
    assert (default["window"], default["sinks"]) == (24, 2)
    assert report["linearize"]["layers"] == {"0": {"sinks": 0}, "1": {"window": 48, "sinks": 0}}
    assert report["sizes"]["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_calibration_reads_the_file_that_is_named(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("A thread of any length is drawn from a spool. " * 10)
    assert run(save_teacher(), tmp_path / "out", *QUICK, "--calibration", text) == 0
    assert load_report(tmp_path / "out")["calibration"]["text"] == "words.txt"


def test_a_dry_run_accounts_and_writes_nothing(
    save_teacher: SaveTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_teacher()
    before = sorted(tmp_path.rglob("*"))
    assert run(source, tmp_path / "new" / "out", "--dry-run", "--window", "16") == 0
    assert sorted(tmp_path.rglob("*")) == before
    options = ConvertOptions(source="", destination=Path("unused"), window=PerLayer(16, ()))
    plan = plan_conversion(open_source(str(source)), options)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"source tensors {len(plan.sourced)} used {len(plan.sourced)} dropped 0" in printed
    assert f"parameters {plan.num_parameters:,} new" in printed
    assert f"state per session {state_bytes(plan.config):,} bytes at any length" in printed
    assert "exact up to 20 tokens" in printed
    assert "an estimate" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-shard-size", "big"], "'big' is not a size like 500MB or 2GiB"),
        (["--max-shard-size", "0"], "must be at least a byte"),
        (["--window", "3,4"], "'4' is neither a number nor"),
        (["--calibration-length", "0"], "is not a count"),
        (["--gate", "nope"], "invalid choice: 'nope'"),
        (["--wat"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("source", tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_user_can_put_right_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_conversion_leaves_nothing(save_teacher: SaveTeacher, tmp_path: Path, sent: signal.Signals) -> None:
    place = tmp_path / "models"
    arguments = [str(save_teacher(num_hidden_layers=60)), str(place / "out"), "--window", "16"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", VERB, *arguments], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(place.glob(".out.partial-*/tokenizer.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not place.exists()
