"""`unspool bench decode` on a tiny model: every row is whole, and flags that cannot be are refused."""

import json
import math
from pathlib import Path

import pytest

from unspool.cli import main
from unspool_kernels.native.library import available

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")


def test_each_format_and_position_gets_a_row(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quant", "none,int8", "--contexts", "8,40", "--rounds", "40", "--json"]
    assert main(["bench", "decode", str(chat_model), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["quant"], row["context"]) for row in report["rows"]] == [
        ("none", 8),
        ("none", 40),
        ("int8", 8),
        ("int8", 40),
    ]
    for row in report["rows"]:
        ratios = [row["share_of_bound"], row["batch_gain"], row["seconds"], row["bound"]]
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
        moved = row["weight_bytes"] + row["state_bytes_read"] + 2 * row["state_bytes_updated"]
        assert row["bytes_moved"] == moved
    assert report["rows"][0]["weight_bytes"] > 2 * report["rows"][2]["weight_bytes"]


def test_transformers_runs_in_turns_with_it(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quant", "none", "--contexts", "8", "--rounds", "8", "--against", "transformers"]
    assert main(["bench", "decode", str(chat_model), *flags]) == 0
    assert "vs transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rounds", "0"], "--rounds and --threads must be at least 1"),
        (["--contexts", "0"], "contexts must be between 1 and 1048576"),
        (["--quant", "int3"], "'int3' is not one of"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    chat_model: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", "decode", str(chat_model), *flags])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert complaint in capsys.readouterr().err
