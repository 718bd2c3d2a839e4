"""Recurrent cells in a plain PyTorch loop, which the native ones are held against."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool_kernels.ops.recurrent_cell import FRESH, GATES, Cell, recurrent_cell
from unspool_kernels.reference.recurrent_cell import CELLS

BATCH, STEPS, HEADS, CHANNELS = 8, 512, 4, 64
SETTLING_SECONDS = 0.2
"""After which the threads of the one have gone to sleep, and leave the cores to the other."""


@dataclass(frozen=True)
class CellRace:
    """Medians of one pass over all tokens."""

    cell: Cell
    seconds: float
    eager_seconds: float

    @property
    def speedup(self) -> float:
        return self.eager_seconds / self.seconds


def race_cells(rounds: int) -> list[CellRace]:
    """Every cell, at the module's sizes."""
    return [_race(cell, rounds) for cell in GATES]


def eager_cell(x: Tensor, weight: Tensor, cell: Cell, state: Tensor) -> Tensor:
    """h [B, T, H, D] of x [B, T, H, gates, D] with weight [H, gates, D, D], from state [B, H, states, D]."""
    heads, gates, width, _ = weight.shape
    matrix = weight.reshape(heads, gates * width, width).mT.contiguous()
    inputs = x.permute(1, 3, 2, 0, 4).contiguous()  # [T, gates, H, B, D]
    states = tuple(part.transpose(0, 1).contiguous() for part in state.unbind(2))
    outputs = []
    for token in inputs:
        recurrent = torch.bmm(states[0], matrix).view(heads, -1, gates, width)
        states = CELLS[cell](token.unbind(0), recurrent.unbind(2), states)
        outputs.append(states[0])
    return torch.stack(outputs).permute(2, 0, 1, 3)


@torch.inference_mode()
def _race(cell: Cell, rounds: int) -> CellRace:
    gates = int(GATES[cell])
    x = torch.randn(BATCH, STEPS, HEADS, gates, CHANNELS)
    weight = torch.randn(HEADS, gates, CHANNELS, CHANNELS) * CHANNELS**-0.5
    state = torch.tensor(FRESH[cell]).view(1, 1, -1, 1).repeat(BATCH, HEADS, 1, CHANNELS)
    slots, ends = torch.arange(BATCH, dtype=torch.int32), torch.arange(0, BATCH * STEPS + 1, STEPS, dtype=torch.int32)

    def native() -> Tensor:
        packed = x.view(BATCH * STEPS, HEADS, gates, CHANNELS)
        tensors = {"state": state.clone(), "slots": slots, "cu_seqlens": ends}
        return recurrent_cell(packed, weight, cell=cell, backend="native", check=False, **tensors)

    return CellRace(cell, _median(native, rounds), _median(lambda: eager_cell(x, weight, cell, state), rounds))


def _median(run: Callable[[], object], rounds: int) -> float:
    time.sleep(SETTLING_SECONDS)
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
