"""`unspool bench kernels`: a step of every kernel against the time that memory takes for the bytes it must move.

Everything is measured in one process. The bound is the bandwidth just before or just after, whichever is better.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from unspool.bench.eager_cells import BATCH, CHANNELS, HEADS, STEPS, CellRace, race_cells
from unspool.bench.kernel_cases import KernelCase, Step, kernel_cases
from unspool.bench.machines import Cpu, Gpu, Machine
from unspool.bench.report import Bar, Column, Report, add_report_flags, check_report_flags, draw_bars, write_report
from unspool.bench.tile_search import TileSearch, search_tiles
from unspool.errors import UserError
from unspool_kernels.contract import why_missing
from unspool_kernels.native.library import MAX_THREADS, NativeUnavailable, library

NO_GPU = "No GPU was found: the triton kernels were not measured."
SEARCHED_MIXER = "mamba2"


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one machine. `seconds` are those of the fastest step, `bound` the least that the bytes can take."""

    machine: str
    family: str
    kernel: str
    seconds: float
    bytes_read: int
    bytes_updated: int
    bytes_written: int
    read_bandwidth: float
    update_bandwidth: float

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + 2 * self.bytes_updated + self.bytes_written

    @property
    def bound(self) -> float:
        changed = 2 * self.bytes_updated + self.bytes_written
        return self.bytes_read / self.read_bandwidth + changed / self.update_bandwidth

    @property
    def share_of_bound(self) -> float:
        return self.bound / self.seconds

    def record(self) -> dict[str, Any]:
        return asdict(self) | {
            "bytes_moved": self.bytes_moved,
            "bound": self.bound,
            "share_of_bound": self.share_of_bound,
        }


def add_kernels(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    families = sorted({case.family for case in kernel_cases()})
    parser.add_argument(
        "--families", type=_families, default=families, help=f"comma-separated (default: all of {', '.join(families)})"
    )
    parser.add_argument("--megabytes", type=int, help="size of a kernel's operands (default: 4 times the last cache)")
    parser.add_argument("--rounds", type=int, default=15, help="steps timed of each kernel (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add_report_flags(parser, plot=True)
    return run_kernels


def run_kernels(arguments: argparse.Namespace) -> int:
    """Raises UserError without the native kernels, and for counts and files that cannot be."""
    _check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    num_bytes = None if arguments.megabytes is None else arguments.megabytes << 20
    machines: list[Machine] = [Cpu(num_bytes)]
    if torch.cuda.is_available():
        machines.append(Gpu(num_bytes))
    rows, missing = [], []
    for machine in machines:
        cases = [case for case in kernel_cases() if case.family in arguments.families]
        able = [case for case in cases if why_missing(machine.backend, case.module) is None]
        missing += [f"{machine.name}: no {case.family}" for case in cases if case not in able]
        rows += [measure_kernel(case, machine, arguments.rounds) for case in able]
    races = race_cells(arguments.rounds) if "recurrent_cell" in arguments.families else []
    tiles = search_tiles(machines[0], SEARCHED_MIXER, arguments.rounds) if "row_state" in arguments.families else None
    notes = [*dict.fromkeys(missing), *([] if len(machines) > 1 else [NO_GPU])]
    write_report(_report(rows, races, tiles, notes), arguments)
    return 0


@torch.inference_mode()
def measure_kernel(case: KernelCase, machine: Machine, rounds: int) -> KernelRow:
    """The fastest of some steps, and what memory can do around them."""
    step: Step = case.build(machine)
    before = machine.measure()
    seconds = machine.fastest(step.run, rounds)
    bandwidth = before.better(machine.measure())
    return KernelRow(
        machine=machine.name,
        family=case.family,
        kernel=case.kernel,
        seconds=seconds,
        bytes_read=step.read_bytes,
        bytes_updated=step.updated_bytes,
        bytes_written=step.written_bytes,
        read_bandwidth=bandwidth.read,
        update_bandwidth=bandwidth.update,
    )


def _check(arguments: argparse.Namespace) -> None:
    counts = {"--rounds": arguments.rounds, "--megabytes": arguments.megabytes, "--threads": arguments.threads}
    for flag, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{flag} must be at least 1, not {count}")
    if (arguments.threads or 1) > MAX_THREADS:
        raise UserError(f"--threads must be at most {MAX_THREADS}, not {arguments.threads}")
    check_report_flags(arguments)
    try:
        library()
    except NativeUnavailable as error:
        raise UserError(f"bench kernels measures the native kernels: {error}") from error


def _families(text: str) -> list[str]:
    known = {case.family for case in kernel_cases()}
    values = text.split(",")
    if unknown := [value for value in values if value not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(sorted(known))}")
    return values


_COLUMNS = (
    Column("family", 0, lambda row: row["family"]),
    Column("kernel", 0, lambda row: row["kernel"]),
    Column("ms/step", 9, lambda row: f"{row['seconds'] * 1e3:.2f}"),
    Column("MB/step", 9, lambda row: f"{row['bytes_moved'] / 1e6:.1f}"),
    Column("GB/s", 7, lambda row: f"{row['bytes_moved'] / row['seconds'] / 1e9:.1f}"),
    Column("bound", 7, lambda row: f"{row['bytes_moved'] / row['bound'] / 1e9:.1f}"),
    Column("of bound", 9, lambda row: f"{row['share_of_bound']:.2f}"),
    Column("machine", 0, lambda row: row["machine"]),
)


def _report(
    rows: Sequence[KernelRow], races: Sequence[CellRace], tiles: TileSearch | None, notes: Sequence[str]
) -> Report:
    facts = {
        "threads": torch.get_num_threads(),
        "recurrent_cells": [asdict(race) | {"speedup": race.speedup} for race in races],
        "tiles": None if tiles is None else _tiles_record(tiles),
    }
    several = len({row.machine for row in rows}) > 1
    bars = [
        Bar(f"{row.family}, {row.kernel}" + several * f" ({row.machine})", row.bytes_moved, row.bound, row.seconds)
        for row in rows
    ]
    lines = [*_race_lines(races), *([] if tiles is None else [_tiles_line(tiles)]), *notes]
    return Report(_COLUMNS, [row.record() for row in rows], facts, notes=lines, draw=partial(draw_bars, bars))


def _race_lines(races: Sequence[CellRace]) -> Iterator[str]:
    if races:
        yield f"Recurrent cells against a PyTorch loop, batch {BATCH}, {STEPS} steps, {HEADS} heads of {CHANNELS}:"
    for race in races:
        milliseconds = f"{race.seconds * 1e3:7.2f} ms, eager {race.eager_seconds * 1e3:7.2f} ms"
        yield f"  {race.cell:<6} {milliseconds}: {race.speedup:.1f}x"


def _tiles_record(tiles: TileSearch) -> dict[str, Any]:
    return asdict(tiles) | {
        "proposed": tiles.proposed._asdict(),
        "best": tiles.best._asdict(),
        "ratio": tiles.ratio,
    }


def _tiles_line(tiles: TileSearch) -> str:
    proposed, best = (f"{tile.row_block} x {tile.value_rows}" for tile in (tiles.proposed, tiles.best))
    return (
        f"Tiles of row_state, {tiles.mixer}: the proposed {proposed} rows take {tiles.ratio:.2f} times as long as "
        f"{best}, the best of all {tiles.num_tiles} legal ones"
    )
