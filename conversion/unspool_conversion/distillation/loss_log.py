"""The record of a run while it lasts: one JSON line a step, and a plot where matplotlib is installed."""

import json
import logging
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unspool.errors import UserError

LOG, PLOT = "loss.jsonl", "loss.png"
_SECONDS_BETWEEN_PLOTS = 20.0

_log = logging.getLogger(__name__)


class LossLog:
    """Appends to `loss.jsonl` in a directory, cut to `num_bytes`, what the run that is continued had written."""

    def __init__(self, directory: Path, num_bytes: int) -> None:
        self.path = directory / LOG
        self._plotted = float("-inf")
        self._stream = self.path.open("ab")
        self._stream.truncate(min(num_bytes, self.num_bytes))

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._stream.fileno()).st_size

    def append(self, record: dict[str, Any]) -> None:
        """Raises UserError when the line cannot be written."""
        try:
            self._stream.write(json.dumps(record).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); make room and pass --resume") from error

    def refresh_plot(self, *, now: bool = False) -> None:
        """Draws the log anew, but seldom unless it must be `now`."""
        if find_spec("matplotlib") is None or (time.monotonic() - self._plotted < _SECONDS_BETWEEN_PLOTS and not now):
            return
        self._plotted = time.monotonic()
        lines = self.path.read_text(encoding="utf-8").splitlines()
        try:
            draw_losses([json.loads(line) for line in lines], self.path.with_name(PLOT))
        except OSError as error:
            _log.warning("%s is not drawn: %s", self.path.with_name(PLOT), error)

    def close(self) -> None:
        self._stream.close()


def draw_losses(records: list[dict[str, Any]], path: Path) -> None:
    """One panel a stage: the loss of every step on a logarithmic axis, a line a layer in a layerwise stage."""
    from matplotlib.figure import Figure

    curves: dict[int, dict[int, list[tuple[int, float]]]] = {}
    for record in records:
        layers = curves.setdefault(record["stage"], {})
        layers.setdefault(record.get("layer", -1), []).append((record["step"], record["loss"]))
    if not curves:
        return
    figure = Figure(figsize=(6.0 * len(curves), 4.0), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (stage, layers) in zip(panels, sorted(curves.items()), strict=True):
        for layer, points in layers.items():
            panel.plot(*zip(*points, strict=True), label=f"layer {layer}" if layer >= 0 else None, linewidth=1)
        panel.set(title=f"stage {stage + 1}", xlabel="step", ylabel="loss", yscale="log")
        if 1 < len(layers) <= 8:
            panel.legend(fontsize="small")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
