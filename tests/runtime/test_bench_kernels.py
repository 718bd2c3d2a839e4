"""`unspool bench kernels` on operands of a megabyte."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unspool.bench import add_bench, kernels, report
from unspool.bench.eager_cells import eager_cell
from unspool.bench.kernel_cases import FEATURES, HEADS, kernel_cases
from unspool.bench.machines import Cpu
from unspool.errors import UserError
from unspool_kernels.native.library import available
from unspool_kernels.native.packed import FORMATS
from unspool_kernels.ops.recurrent_cell import FRESH, GATES, Cell, recurrent_cell

NATIVE = pytest.mark.skipif(not available(), reason="this install has no native kernels")
FAMILIES = {
    *("row_state", "diagonal_scan", "exponential_scan", "softmax_scan", "ring_attention", "recurrent_cell"),
    *("short_conv", "rms_norm", "packed_matrix"),
}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    run = add_bench(parser)
    return run(parser.parse_args(["kernels", "--rounds", "1", "--threads", "1", *map(str, arguments)]))


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(kernels, "Cpu", measure)


@NATIVE
def test_every_family_is_held_against_a_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--megabytes", 1, "--json", tmp_path / "kernels.json") == 0
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["family"] for row in record["rows"]} == FAMILIES
    for row in record["rows"]:
        assert 0.0 < row["share_of_bound"] < math.inf
        assert row["share_of_bound"] == pytest.approx(row["bound"] / row["seconds"])
        assert row["bytes_moved"] >= 400_000
    assert {row["kernel"] for row in record["rows"] if row["family"] == "packed_matrix"} == set(FORMATS)
    assert {race["cell"] for race in record["recurrent_cells"]} == set(GATES)
    assert all(0.0 < race["speedup"] < math.inf for race in record["recurrent_cells"])
    assert 1.0 <= record["tiles"]["ratio"] < math.inf
    assert record["tiles"]["num_tiles"] > 1
    written = capsys.readouterr().out
    assert all(family in written for family in FAMILIES)
    assert (kernels.NO_GPU in written) == (not torch.cuda.is_available())


@NATIVE
def test_json_without_a_file_takes_the_place_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--megabytes", 1, "--families", "rms_norm", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    cpu_rows = [row for row in record["rows"] if row["machine"].startswith("1 threads")]
    assert [row["family"] for row in cpu_rows] == ["rms_norm"]
    assert record["tiles"] is None
    assert record["recurrent_cells"] == []


@NATIVE
@pytest.mark.parametrize(("mixer", "rows"), [("liger-gla", FEATURES), ("mlstm", FEATURES + 1)])
def test_a_state_is_counted_once_read_and_once_written(mixer: str, rows: int) -> None:
    case = next(case for case in kernel_cases() if case.kernel == f"{mixer} fp16")
    step = case.build(Cpu(4 << 20))
    sequences = (4 << 20) // (HEADS * rows * FEATURES * 2)
    maxima = 4 * HEADS * sequences if mixer == "mlstm" else 0
    assert step.updated_bytes == sequences * HEADS * rows * FEATURES * 2 + maxima
    assert step.read_bytes < step.updated_bytes / 4


@NATIVE
def test_large_steps_take_their_sequences_in_batches() -> None:
    for case in kernel_cases():
        if case.family in ("exponential_scan", "softmax_scan", "short_conv", "rms_norm"):
            machine = Cpu(2 << 20)
            whole = case.build(machine)
            machine.batch = 16
            parted = case.build(machine)
            assert parted.read_bytes == whole.read_bytes
            assert whole.written_bytes > parted.written_bytes == 0
            parted.run()


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--megabytes", "0"), "--megabytes must be at least 1"),
        (("--threads", "-1"), "--threads must be at least 1"),
        (("--threads", "256"), "--threads must be at most 255"),
        (("--plot", "bars.jpg"), "must end in .png"),
        (("--plot", "no/such/folder/bars.png"), "does not exist"),
        (("--json", "no/such/folder/kernels.json"), "does not exist"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        bench(*flags)


def test_unknown_families_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench("--families", "rms_norm,matmul")
    assert caught.value.code == 2
    assert "'matmul' is not one of" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_measured")
def test_a_plot_without_matplotlib_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unspool\[plot\]'"):
        bench("--plot", tmp_path / "bars.png")


@NATIVE
@pytest.mark.parametrize("cell", GATES)
def test_the_loop_that_cells_are_held_against_computes_the_same(cell: Cell) -> None:
    gates, torch_generator = int(GATES[cell]), torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 2, gates, 8, generator=torch_generator)
    weight = torch.randn(2, gates, 8, 8, generator=torch_generator)
    state = torch.tensor(FRESH[cell]).view(1, 1, -1, 1).repeat(3, 2, 1, 8)
    eager = eager_cell(x, weight, cell, state)
    packing = {"slots": torch.arange(3, dtype=torch.int32), "cu_seqlens": torch.arange(0, 16, 5, dtype=torch.int32)}
    native = recurrent_cell(x.view(15, 2, gates, 8), weight, cell=cell, state=state, backend="native", **packing)
    torch.testing.assert_close(native.view(3, 5, 2, 8), eager, rtol=1e-4, atol=1e-5)
