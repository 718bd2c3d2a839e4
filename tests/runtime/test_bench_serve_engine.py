"""`unspool bench serve-engine` on a tiny model: every figure is there, and flags that cannot be are refused."""

import json
import math
from pathlib import Path

import pytest

from unspool.cli import main

QUICK = ["--prompt", "5", "--tokens", "6", "--long-prompt", "300", "--forks", "3", "--rounds", "2"]


def test_every_figure_is_there(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--concurrency", "1,3", "--max-slots", "3", "--json", str(file), "--plot", str(plot)]
    assert main(["bench", "serve-engine", str(chat_model), *QUICK, *flags]) == 0
    report = json.loads(file.read_text())
    assert [row["concurrency"] for row in report["rows"]] == [1, 3] and report["slots"] == 3
    assert [row["tier"] for row in report["restores"]] == ["memory", "store"]
    assert report["forks"]["forks"] == 3 and report["long_prompt"]["long_prompt_tokens"] == 300
    numbers = [
        value
        for row in [*report["rows"], *report["restores"], report["forks"], report["long_prompt"]]
        for value in row.values()
        if not isinstance(value, str)
    ]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert all(row["first_token_seconds"] > row["restore_seconds"] for row in report["restores"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "3 forks" in told and "a prompt of 300 tokens beside 1 requests" in told and "memory" in told


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--concurrency", "0"], "counts must be between 1 and 4096"),
        (["--concurrency", "x"], "'x' is not a list of counts"),
        (["--tokens", "1"], "--tokens is too small"),
        (["--slot-memory", "1kB"], "slot_memory: holds no slot"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    chat_model: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", "serve-engine", str(chat_model), *flags])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert complaint in capsys.readouterr().err
