"""What every benchmark writes: a table, JSON and a plot, each file whole or not at all."""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from unspool.bench import add_bench
from unspool.bench.report import Bar, Column, Report, add_report_flags, check_report_flags, draw_bars, write_report
from unspool.errors import UserError
from unspool_kernels.native.library import available


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    run = add_bench(parser)
    return run(parser.parse_args(list(map(str, arguments))))


def test_length_writes_its_rows_beside_the_table(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--positions", "5,20", "--rounds", 1, "--json", tmp_path / "length.json")
    assert bench("length", chat_model, *flags) == 0
    rows = json.loads((tmp_path / "length.json").read_text())["rows"]
    assert [row["position"] for row in rows] == [5, 20]
    assert rows[0]["ratio"] == 1.0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["position", "ms/token", "ratio", "state", "MB", "process", "MB", "KV", "cache", "MB"]
    assert [line.split()[0] for line in lines] == ["5", "20"]


@pytest.mark.skipif(not available(), reason="this install has no native kernels")
def test_decode_writes_json_alone_and_a_plot(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    flags = ("--quant", "none,int8", "--contexts", 8, "--rounds", 2, "--threads", 1)
    assert bench("decode", chat_model, *flags, "--json", "--plot", tmp_path / "decode.png") == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["quant"] for row in record["rows"]] == ["none", "int8"]
    assert all(row["share_of_bound"] > 0.0 and row["bytes_moved"] > row["weight_bytes"] for row in record["rows"])
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def written(tmp_path: Path, *flags: str, **changes: Any) -> None:
    """Writes a report of one row with the flags given."""
    parser = argparse.ArgumentParser()
    add_report_flags(parser, plot=True)
    arguments = parser.parse_args(list(flags))
    check_report_flags(arguments)
    columns = [Column("name", 0, lambda row: row["name"]), Column("ms", 6, lambda row: f"{row['ms']:.1f}")]
    fields: dict[str, Any] = {"rows": [{"name": "a kernel", "ms": 2.0}], "facts": {"threads": 1}}
    write_report(Report(columns, **(fields | changes)), arguments)


def test_a_table_is_aligned_below_its_heading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, heading=["above"], notes=["below"])
    assert capsys.readouterr().out == "above\nname         ms\na kernel    2.0\nbelow\n"


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written(tmp_path, "--plot", str(tmp_path / "bars.png"), draw=partial(draw_bars, [Bar("a kernel", 1e6, 1e-3, 2e-3)]))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.json").write_text("old")

    def full_disk(self: Path, text: str) -> None:
        self.write_bytes(text.encode()[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        written(tmp_path, "--json", str(tmp_path / "old.json"))
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"
