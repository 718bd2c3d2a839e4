"""Draws an evaluation: likelihood by position and recall by distance, one line a row, with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unspool_conversion.evaluation.likelihood import ALL, FAR
from unspool_conversion.evaluation.variants import CONVERTED, EQUAL_BYTES, STATE_ONLY, TEACHER, WINDOW_ONLY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 150
ROW_SHIFT = 0.08
STYLES = {
    TEACHER: "black",
    WINDOW_ONLY: "tab:grey",
    EQUAL_BYTES: "tab:blue",
    STATE_ONLY: "tab:orange",
    CONVERTED: "tab:red",
}
RECALL = {"needle": "pass key", "mqar": "associative recall"}


def draw_evaluation(evaluation: Mapping[str, Any], file: Path) -> None:
    """Writes a PNG with a panel for each of nll, needle and mqar that was measured, at least one."""
    from matplotlib.figure import Figure  # optional, and slow to import

    panels = drawable(evaluation)
    figure = Figure(figsize=(6.5 * len(panels), 4.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if task == "nll":
            _draw_likelihood(axes, evaluation["nll"])
        else:
            _draw_recall(axes, evaluation[task], RECALL[task])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=DOTS_PER_INCH)


def drawable(tasks: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Which of these have something to draw."""
    return [task for task in ("nll", *RECALL) if task in tasks]


def _draw_likelihood(axes: "Axes", summary: Mapping[str, Any]) -> None:
    places = [name for name in summary["positions"] if name not in (ALL, FAR)]
    rows = {name: [row[place]["nll"] for place in places] for name, row in summary["rows"].items()}
    _draw_rows(axes, places, rows)
    # A state alone may be several nats worse, which would press all other rows into one line.
    ends = [
        record[end] for name, row in rows.items() if name != STATE_ONLY for record in row for end in ("low", "high")
    ]
    margin = max(0.05 * (max(ends) - min(ends)), 0.01)
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    if STATE_ONLY in rows and (least := min(record["value"] for record in rows[STATE_ONLY])) > max(ends) + margin:
        axes.set_title(f"{STATE_ONLY} is above: from {least:.1f}", loc="right", fontsize="small")
    axes.set_xlabel("position")
    axes.set_ylabel("negative log-likelihood, nats a token")


def _draw_recall(axes: "Axes", summary: Mapping[str, Any], title: str) -> None:
    distances = list(next(iter(summary["rows"].values())))
    rows = {name: [row[distance]["accuracy"] for distance in distances] for name, row in summary["rows"].items()}
    _draw_rows(axes, distances, rows)
    axes.axhline(summary["chance"], color="black", linestyle=":", linewidth=1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens between fact and question (dotted: chance)")
    axes.set_ylabel(f"{title}: right answer preferred")


def _draw_rows(axes: "Axes", places: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Rows stand side by side at each place, so that none hides another."""
    for index, (name, records) in enumerate(rows.items()):
        shift = ROW_SHIFT * (index - (len(rows) - 1) / 2)
        values = [record["value"] for record in records]
        below = [max(record["value"] - record["low"], 0.0) for record in records]
        above = [max(record["high"] - record["value"], 0.0) for record in records]
        axes.errorbar(
            [place + shift for place in range(len(places))],
            values,
            [below, above],
            label=name,
            color=STYLES[name],
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.5, len(places) - 0.5)
