"""From a problem to the tile it prefers, or to all its feasible tiles; solved once, remembered by the problem."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol

from unspool_kernels.tiles.solver import Infeasible, Model, Search

REMEMBERED_PROBLEMS = 4096


class TileProblem(Protocol):
    """A kernel's sizes together with its machine's limits. Hashable; equal problems have equal models."""

    def model(self) -> Model: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Tile:
    """A choice of tile sizes by name. Printed, it shows every constraint with its value and limit."""

    problem: TileProblem
    values: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    def __str__(self) -> str:
        box = {name: (value,) for name, value in self.values.items()}
        chosen = " ".join(f"{name}={value}" for name, value in self.values.items())
        reasons = (f"  {c.name}: {c.relation.numbers(box)} ({c.relation})" for c in self.problem.model().constraints)
        return "\n".join((f"{type(self.problem).__name__}: {chosen}", *reasons))


def propose(problem: TileProblem) -> Tile:
    """The preferred tile. Raises Infeasible, naming the constraints that conflict."""
    return _proposed(problem)


def enumerate_tiles(problem: TileProblem) -> Iterator[Tile]:
    """All feasible tiles, preferred first, for an exhaustive search by measurement. Empty if there is none."""
    for values in Search(problem.model()).solutions():
        yield Tile(problem, MappingProxyType(values))


@lru_cache(REMEMBERED_PROBLEMS)
def _proposed(problem: TileProblem) -> Tile:
    tile = next(enumerate_tiles(problem), None)
    if tile is None:
        raise Infeasible(str(problem), problem.model())
    return tile
