"""Every tile for a CPU respects its limits and is the one preferred among all that do, by a second reckoning."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool_kernels.tiles import (
    CpuLimits,
    CpuPackedProduct,
    CpuRowKernel,
    Infeasible,
    TileProblem,
    enumerate_tiles,
    propose,
)
from unspool_kernels.tiles.cpu import even_splits
from unspool_kernels.tiles.solver import Search

Values = Mapping[str, int]
ZEN_3 = CpuLimits(
    threads=2, l1d_bytes=32 << 10, l2_bytes=512 << 10, l3_bytes=32 << 20, vector_registers=16, vector_bytes=32
)
ROWS = CpuRowKernel(slots=8, heads=16, key_features=64, value_channels=64, state_bytes=4, limits=ZEN_3)
PRODUCT = CpuPackedProduct(rows=1, inputs=576, outputs=1536, x_bytes=1, weight_bits=4, limits=ZEN_3)

cpus = st.builds(
    CpuLimits,
    threads=st.integers(1, 9),
    l1d_bytes=st.integers(500, 65_536),
    l2_bytes=st.integers(4_000, 1 << 20),
    l3_bytes=st.just(32 << 20),
    vector_registers=st.sampled_from([16, 32]),
    vector_bytes=st.sampled_from([16, 32, 64]),
)


@dataclass(frozen=True)
class Oracle:
    """The rules of a problem again, in plain arithmetic: candidates, which of them break what, which is preferred."""

    problems: st.SearchStrategy[Any]
    candidates: Callable[[Any], Iterable[Values]]
    broken: Callable[[Any, Values], list[str]]
    preference: Callable[[Values], tuple[int, ...]]

    def feasible(self, problem: TileProblem) -> list[Values]:
        found = [dict(values) for values in self.candidates(problem) if not self.broken(problem, values)]
        return sorted(found, key=self.preference)


def grid(**choices: Iterable[int]) -> Iterable[Values]:
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def up(a: int, b: int) -> int:
    return (a + b - 1) // b


def unbalanced(tasks: int, threads: int) -> list[str]:
    return [] if threads == 1 or tasks == threads or tasks >= 4 * threads else ["balanced tasks"]


def cpu_row_candidates(p: CpuRowKernel) -> Iterable[Values]:
    threads = range(1, p.limits.threads + 1)
    for v in grid(threads=threads, row_block=(1, 4), value_rows=range(1, up(p.value_channels, 4) * 4 + 1)):
        yield {**v, "tasks_per_head": up(p.value_channels, v["value_rows"])}


def cpu_row_broken(p: CpuRowKernel, v: Values) -> list[str]:
    row_bytes = p.key_features * p.state_bytes
    state_bytes = p.slots * p.heads * p.value_channels * row_bytes
    registers = 5 * 64 // p.limits.vector_bytes
    works_little = p.queries == 1 and not p.erase and p.state_bytes == 4
    rules = {
        "rows in half of L1": v["value_rows"] * row_bytes <= p.limits.l1d_bytes // 2,
        "rows within the head": v["value_rows"] < p.value_channels + v["row_block"],
        "whole row blocks": v["value_rows"] % v["row_block"] == 0,
    }
    if v["row_block"] == 4:
        rules["row block within the head"] = p.value_channels >= 4
        rules["vector registers"] = registers <= p.limits.vector_registers
        near = p.key_features <= 64 or state_bytes <= p.limits.l2_bytes * v["threads"]
        rules["row blocks near the core"] = near or not works_little
    tasks = p.slots * p.heads * v["tasks_per_head"]
    return unbalanced(tasks, v["threads"]) + [name for name, holds in rules.items() if not holds]


def product_candidates(p: CpuPackedProduct) -> Iterable[Values]:
    threads, x_rows = range(1, p.limits.threads + 1), range(1, min(8, p.rows) + 1)
    panels = up(p.outputs, p.panel_rows)
    for v in grid(threads=threads, x_rows=x_rows, tasks=range(1, panels + 1)):
        size = up(panels, v["tasks"])
        if up(panels, size) == v["tasks"]:
            yield {**v, "weight_rows": size * p.panel_rows}


def product_broken(p: CpuPackedProduct, v: Values) -> list[str]:
    sums = up(4 * p.panel_rows, p.limits.vector_bytes)
    rules = {"vector registers": v["x_rows"] * sums + 4 <= p.limits.vector_registers}
    if v["x_rows"] > 1:
        rules["rows of x in half of L1"] = v["x_rows"] * p.inputs * p.x_bytes <= p.limits.l1d_bytes // 2
    if p.rows > v["x_rows"] and v["weight_rows"] > p.panel_rows:
        task_bytes = up(v["weight_rows"] * p.inputs * p.weight_bits, 8)
        rules["weights met again in half of L2"] = task_bytes <= p.limits.l2_bytes // 2
    return unbalanced(v["tasks"], v["threads"]) + [name for name, holds in rules.items() if not holds]


ORACLES = [
    Oracle(
        st.builds(
            CpuRowKernel,
            slots=st.integers(1, 4),
            heads=st.integers(1, 9),
            key_features=st.integers(1, 200),
            value_channels=st.integers(1, 70),
            state_bytes=st.sampled_from([2, 4]),
            queries=st.integers(1, 4),
            erase=st.booleans(),
            limits=cpus,
        ),
        cpu_row_candidates,
        cpu_row_broken,
        lambda v: (-v["threads"], -v["row_block"], v["tasks_per_head"], v["value_rows"]),
    ),
    Oracle(
        st.builds(
            CpuPackedProduct,
            rows=st.integers(1, 20),
            inputs=st.integers(1, 3000),
            outputs=st.integers(1, 1500),
            x_bytes=st.sampled_from([1, 2, 4]),
            weight_bits=st.sampled_from([4, 8, 16, 32]),
            panel_rows=st.sampled_from([8, 16]),
            limits=cpus,
        ),
        product_candidates,
        product_broken,
        lambda v: (-v["threads"], -v["x_rows"], v["tasks"]),
    ),
]


@pytest.mark.parametrize("oracle", ORACLES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_proposal_is_the_preferred_one_of_all_tiles_that_break_no_rule(oracle: Oracle, data: st.DataObject) -> None:
    problem = data.draw(oracle.problems)
    expected = oracle.feasible(problem)
    assert [tile.values for tile in enumerate_tiles(problem)] == expected
    if expected:
        assert propose(problem).values == expected[0]
    else:
        with pytest.raises(Infeasible):
            propose(problem)


@pytest.mark.parametrize("oracle", ORACLES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_candidate_of_an_infeasible_problem_breaks_a_named_rule(oracle: Oracle, data: st.DataObject) -> None:
    problem = data.draw(oracle.problems)
    try:
        propose(problem)
    except Infeasible as infeasible:
        for values in oracle.candidates(problem):
            assert set(oracle.broken(problem, values)) & set(infeasible.constraints)


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (replace(ROWS, key_features=8192), "rows in half of L1"),
        (replace(PRODUCT, limits=replace(ZEN_3, vector_registers=4)), "vector registers"),
    ],
)
def test_an_impossible_limit_is_named_alone(problem: TileProblem, name: str) -> None:
    with pytest.raises(Infeasible, match=name) as caught:
        propose(problem)
    assert caught.value.constraints == (name,)


@settings(max_examples=200, deadline=None)
@given(st.one_of(*(oracle.problems for oracle in ORACLES)), st.integers(1, 256))
def test_at_most_a_step_or_so_for_each_thread_finds_a_tile(problem: Any, threads: int) -> None:
    search = Search(replace(problem, limits=replace(problem.limits, threads=threads)).model())
    next(search.solutions(), None)
    assert search.nodes <= 20 + threads


def test_a_head_that_fits_l1_is_one_task_and_long_rows_are_taken_one_by_one() -> None:
    assert propose(ROWS).values == {"threads": 2, "row_block": 4, "tasks_per_head": 1, "value_rows": 64}
    long = replace(ROWS, key_features=128, value_channels=128)
    assert propose(long).values == {"threads": 2, "row_block": 1, "tasks_per_head": 4, "value_rows": 32}


def test_rows_that_need_more_registers_than_there_are_are_taken_one_by_one() -> None:
    narrow = replace(ZEN_3, vector_bytes=16)
    assert propose(replace(ROWS, limits=narrow))["row_block"] == 1
    assert propose(replace(ROWS, limits=replace(narrow, vector_registers=32)))["row_block"] == 4


@pytest.mark.parametrize("work", [{"erase": True}, {"queries": 2}, {"state_bytes": 2}])
def test_long_rows_with_more_work_than_memory_hides_are_taken_four_at_once(work: dict[str, Any]) -> None:
    long = replace(ROWS, slots=64, key_features=128, value_channels=128)
    assert propose(long)["row_block"] == 1
    assert propose(replace(long, **work))["row_block"] == 4


def test_one_row_of_x_gives_each_thread_one_stream_of_weights() -> None:
    assert propose(PRODUCT).values == {"threads": 2, "x_rows": 1, "tasks": 2, "weight_rows": 768}


def test_many_rows_of_x_meet_weights_that_stay_in_l2() -> None:
    tile = propose(replace(PRODUCT, rows=512, inputs=2048, outputs=8192, weight_bits=16))
    assert tile["x_rows"] == 8
    assert tile["weight_rows"] * 2048 * 2 <= ZEN_3.l2_bytes // 2


def test_even_splits_are_all_that_parts_of_one_size_can_give() -> None:
    for count in range(1, 300):
        assert even_splits(count) == tuple(sorted({up(count, size) for size in range(1, count + 1)}))


def test_sizes_below_one_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"CpuPackedProduct\.rows: must be at least 1, got 0"):
        replace(PRODUCT, rows=0)
    with pytest.raises(ValueError, match=r"CpuLimits\.threads"):
        replace(ZEN_3, threads=0)
