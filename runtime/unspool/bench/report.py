"""What every benchmark gives: a table on stdout, JSON, and a plot of what was reached beside what memory allows."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from unspool.errors import UserError

STDOUT = Path("-")
NO_MATPLOTLIB = "--plot needs matplotlib: pip install 'unspool[plot]'"
BAR_INCHES = 0.45
DOTS_PER_INCH = 150

Row = Mapping[str, Any]


class Column(NamedTuple):
    """`text` makes a cell of a row; one of width 0 is as wide as its longest cell, and is aligned to the left."""

    title: str
    width: int
    text: Callable[[Row], str]


class Bar(NamedTuple):
    """Bytes that had to move, the least seconds that this takes, and the seconds that it took."""

    label: str
    num_bytes: float
    bound: float
    seconds: float


class Table(NamedTuple):
    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Report:
    """`rows` go into the JSON object as they are, beside `facts`. Lines of `heading` and `notes` surround the table."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    facts: Mapping[str, Any]
    heading: Sequence[str] = ()
    tables: Sequence[Table] = ()
    """More of them, with rows of their own."""
    notes: Sequence[str] = ()
    draw: Callable[[Path], object] | None = None
    """Writes the plot."""


def add_report_flags(parser: argparse.ArgumentParser, *, plot: bool) -> None:
    """--json [FILE], and --plot FILE for benchmarks that have a bound."""
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="one JSON object: instead of the table, or with FILE beside it",
    )
    if plot:
        parser.add_argument(
            "--plot", type=Path, metavar="FILE.png", help="a picture of the bounds and what was reached"
        )


def check_report_flags(arguments: argparse.Namespace) -> None:
    """Raises UserError for what could not be written later; to be called before anything is measured."""
    plot: Path | None = getattr(arguments, "plot", None)
    if plot is not None:
        if plot.suffix != ".png":
            raise UserError(f"--plot writes PNG: {plot} must end in .png")
        if find_spec("matplotlib") is None:
            raise UserError(NO_MATPLOTLIB)
    for flag, file in (("--json", arguments.json), ("--plot", plot)):
        if file is not None and file != STDOUT and (file.is_dir() or not file.parent.is_dir()):
            raise UserError(f"{flag}: {file} is a directory, or is in one that does not exist")


def write_report(report: Report, arguments: argparse.Namespace) -> None:
    """Writes what the flags of `add_report_flags` ask for."""
    record = json.dumps({**report.facts, "rows": report.rows}) + "\n"
    sys.stdout.write(record if arguments.json == STDOUT else table(report))
    if arguments.json not in (None, STDOUT):
        _replace(arguments.json, lambda file: file.write_text(record))
    if getattr(arguments, "plot", None) is not None:
        assert report.draw is not None, "only benchmarks with a plot have the flag"
        _replace(arguments.plot, report.draw)


def table(report: Report) -> str:
    """The heading, one line for every row under the columns' titles, further tables, and the notes."""
    lines = [*report.heading, *_lines(Table(report.columns, report.rows))]
    for further in report.tables:
        lines += ["", *_lines(further)]
    return "\n".join([*lines, *([""] if report.tables else []), *report.notes]) + "\n"


def _lines(table: Table) -> list[str]:
    cells = [[column.title for column in table.columns]]
    cells += [[column.text(row) for column in table.columns] for row in table.rows]
    longest = [max(map(len, texts)) for texts in zip(*cells, strict=True)]
    return [
        " ".join(
            text.rjust(column.width) if column.width else text.ljust(width)
            for text, column, width in zip(line, table.columns, longest, strict=True)
        ).rstrip()
        for line in cells
    ]


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
            written = Path(folder, file.name)
            write(written)
            os.replace(written, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def draw_bars(bars: Sequence[Bar], file: Path) -> None:
    """Two horizontal bars each, in GB/s: what the bound stands for, and what was reached with its share of that."""
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(9, 1.2 + BAR_INCHES * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(bars))
    allowed = [bar.num_bytes / bar.bound / 1e9 for bar in bars]
    reached = [bar.num_bytes / bar.seconds / 1e9 for bar in bars]
    axes.barh([place - 0.2 for place in places], allowed, height=0.4, color="lightgrey", label="memory's bound")
    drawn = axes.barh([place + 0.2 for place in places], reached, height=0.4, color="tab:blue", label="reached")
    axes.bar_label(drawn, [f"{bar.bound / bar.seconds:.2f}" for bar in bars], padding=3)
    axes.set_yticks(list(places), [bar.label for bar in bars])
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.set_xlabel("GB/s, and share of the bound")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(file, dpi=DOTS_PER_INCH)
