"""The tile that the solver proposes for a step of the row kernel, against the best of all tiles that are legal."""

import time
from dataclasses import dataclass

import torch

from unspool.bench.kernel_cases import MIXERS, row_tensors
from unspool.bench.machines import Machine
from unspool_kernels.native.library import instruction_set
from unspool_kernels.native.row_state import RowTile, choose_tile, row_problem, row_state
from unspool_kernels.tiles import enumerate_tiles


@dataclass(frozen=True)
class TileSearch:
    """Seconds are those of the fastest round."""

    mixer: str
    proposed: RowTile
    best: RowTile
    seconds: float
    best_seconds: float
    num_tiles: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.best_seconds


def search_tiles(machine: Machine, mixer: str, rounds: int) -> TileSearch:
    """Times every legal tile once a round, so that a busy machine slows all of them alike."""
    kernel, tensors = MIXERS[mixer], row_tensors(machine, mixer, torch.float32)
    q, state, count = tensors["q"], tensors["state"], tensors["slots"].shape[0]
    threads = (torch.get_num_threads(), instruction_set())
    problem = row_problem(count, tuple(q.shape[1:]), state.shape[2], 4, kernel.erase != "none", threads)
    tiles = dict.fromkeys(RowTile(tile["row_block"], tile["value_rows"]) for tile in enumerate_tiles(problem))
    fastest = dict.fromkeys(tiles, float("inf"))
    for _ in range(rounds):
        for tile in tiles:
            start = time.perf_counter()
            row_state(kernel=kernel, tile=tile, **tensors)
            fastest[tile] = min(fastest[tile], time.perf_counter() - start)
    proposed = choose_tile(count, q, state, kernel)
    best = min(fastest, key=fastest.__getitem__)
    return TileSearch(mixer, proposed, best, fastest[proposed], fastest[best], len(tiles))
