"""Every tile for a GPU respects its limits and is the one preferred among all that do, by a second reckoning."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool_kernels.tiles import (
    SM_80,
    SM_90,
    GpuChunkKernel,
    GpuLimits,
    GpuRingAttention,
    GpuRowKernel,
    Infeasible,
    TileProblem,
    enumerate_tiles,
    propose,
)
from unspool_kernels.tiles.solver import Search

Values = Mapping[str, int]
LONE = GpuRowKernel(slots=1, heads=8, key_features=64, value_channels=64, limits=SM_90)
CHUNK = GpuChunkKernel(sequences=8, heads=16, key_features=128, value_channels=128, element_bytes=4, limits=SM_80)
RING = GpuRingAttention(queries=3, head_dim=64, ring_rows=260, limits=SM_90)
WARPS = (1, 2, 4, 8)

sizes = st.integers(1, 200)
gpus = st.builds(
    GpuLimits,
    multiprocessors=st.integers(1, 160),
    shared_bytes=st.integers(2_000, 240_000),
    registers_per_thread=st.integers(64, 255),
    registers_per_block=st.sampled_from([16_384, 32_768, 65_536]),
    threads_per_block=st.sampled_from([32, 128, 1024]),
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


def power_of_two_above(size: int, least: int) -> int:
    while least < size:
        least *= 2
    return least


def powers_of_two(low: int, high: int) -> list[int]:
    return [2**n for n in range(12) if low <= 2**n <= high]


def up(a: int, b: int) -> int:
    return (a + b - 1) // b


def broken_thread_limits(elements: int, warps: int, limits: GpuLimits) -> list[str]:
    registers = up(elements, 32 * warps) + 63
    rules = {
        "registers per thread": registers <= limits.registers_per_thread,
        "registers per block": registers * 32 * warps <= limits.registers_per_block,
        "threads per block": 32 * warps <= limits.threads_per_block,
    }
    return [name for name, holds in rules.items() if not holds]


def gpu_row_candidates(p: GpuRowKernel) -> Iterable[Values]:
    keys = powers_of_two(16, power_of_two_above(p.key_features, 16))
    rows = powers_of_two(8, min(32, power_of_two_above(p.value_channels, 8)))
    for v in grid(key_block=keys, value_block=rows, warps=WARPS):
        blocks = p.slots * p.heads * up(p.value_channels, v["value_block"])
        yield {"busy_multiprocessors": min(blocks, p.limits.multiprocessors), **v}


def gpu_row_broken(p: GpuRowKernel, v: Values) -> list[str]:
    state = v["key_block"] * v["value_block"]
    idle = [] if state >= 32 * v["warps"] else ["an element for each thread"]
    return broken_thread_limits(2 * state, v["warps"], p.limits) + idle


def gpu_chunk_candidates(p: GpuChunkKernel) -> Iterable[Values]:
    keys = powers_of_two(16, min(128, power_of_two_above(p.key_features, 16)))
    rows = powers_of_two(16, min(128, power_of_two_above(p.value_channels, 16)))
    for v in grid(chunk=(16, 32, 64), key_block=keys, value_block=rows, stages=(1, 2, 3), warps=WARPS):
        blocks = p.sequences * p.heads * up(p.value_channels, v["value_block"])
        yield {"busy_multiprocessors": min(blocks, p.limits.multiprocessors), **v}


def gpu_chunk_broken(p: GpuChunkKernel, v: Values) -> list[str]:
    chunk = v["chunk"]
    width = p.key_operands * v["key_block"] + p.value_operands * v["value_block"]
    shared = 1024 + 4 * chunk**2 + v["stages"] * chunk * width * p.element_bytes
    sums = max(v["key_block"] * v["value_block"], chunk * v["value_block"] + chunk**2)
    too_much = [] if shared <= p.limits.shared_bytes else ["shared memory"]
    return too_much + broken_thread_limits(3 * sums, v["warps"], p.limits)


def ring_broken(p: GpuRingAttention, v: Values) -> list[str]:
    width, rows = power_of_two_above(p.head_dim, 16), v["ring_block"]
    return broken_thread_limits(3 * width * rows + 2 * p.queries * width + p.queries * rows, v["warps"], p.limits)


ORACLES = [
    Oracle(
        st.builds(
            GpuRowKernel, slots=sizes, heads=st.integers(1, 20), key_features=sizes, value_channels=sizes, limits=gpus
        ),
        gpu_row_candidates,
        gpu_row_broken,
        lambda v: (-v["busy_multiprocessors"], -v["key_block"], -v["value_block"], v["warps"]),
    ),
    Oracle(
        st.builds(
            GpuChunkKernel,
            sequences=st.integers(1, 9),
            heads=st.integers(1, 20),
            key_features=sizes,
            value_channels=sizes,
            element_bytes=st.sampled_from([2, 4]),
            key_operands=st.integers(2, 4),
            value_operands=st.integers(1, 2),
            limits=gpus,
        ),
        gpu_chunk_candidates,
        gpu_chunk_broken,
        lambda v: (
            *(-v[name] for name in ("busy_multiprocessors", "chunk", "key_block", "value_block", "stages")),
            v["warps"],
        ),
    ),
    Oracle(
        st.builds(
            GpuRingAttention,
            queries=st.integers(1, 16),
            head_dim=sizes,
            ring_rows=st.integers(1, 1100),
            limits=gpus,
        ),
        lambda p: grid(
            ring_block=powers_of_two(16, min(128, power_of_two_above(p.ring_rows, 16))),
            warps=WARPS,
        ),
        ring_broken,
        lambda v: (-v["ring_block"], v["warps"]),
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
        (replace(LONE, limits=replace(SM_90, registers_per_thread=63)), "registers per thread"),
        (replace(LONE, limits=replace(SM_90, registers_per_block=1024)), "registers per block"),
        (replace(LONE, limits=replace(SM_90, threads_per_block=16)), "threads per block"),
        (replace(CHUNK, limits=replace(SM_80, shared_bytes=4096)), "shared memory"),
        (replace(RING, limits=replace(SM_90, registers_per_thread=64)), "registers per thread"),
    ],
)
def test_an_impossible_limit_is_named_alone(problem: TileProblem, name: str) -> None:
    with pytest.raises(Infeasible, match=name) as caught:
        propose(problem)
    assert caught.value.constraints == (name,)


@settings(max_examples=200, deadline=None)
@given(st.one_of(*(oracle.problems for oracle in ORACLES)))
def test_a_tile_is_found_in_few_steps(problem: TileProblem) -> None:
    search = Search(problem.model())
    next(search.solutions(), None)
    assert search.nodes <= 20


def test_a_lone_sequence_gets_narrow_blocks_and_a_full_batch_gets_wide_ones() -> None:
    assert propose(LONE)["value_block"] == 8
    assert propose(replace(LONE, slots=64))["value_block"] == 32


def test_less_shared_memory_means_fewer_stages_before_a_shorter_chunk() -> None:
    large, small = propose(replace(CHUNK, limits=SM_90)), propose(CHUNK)
    assert (large["chunk"], large["stages"]) == (64, 2)
    assert (small["chunk"], small["stages"]) == (64, 1)


def test_sizes_below_one_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"GpuRowKernel\.heads: must be at least 1, got 0"):
        GpuRowKernel(slots=1, heads=0, key_features=64, value_channels=64, limits=SM_90)
    with pytest.raises(ValueError, match=r"GpuLimits\.shared_bytes"):
        replace(SM_80, shared_bytes=-1)
