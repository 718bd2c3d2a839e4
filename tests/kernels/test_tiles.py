"""What all tile problems share: few steps, no influence of history, solved once, printed with reasons."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool_kernels.tiles import (
    SM_80,
    SM_90,
    CpuLimits,
    CpuPackedProduct,
    CpuRowKernel,
    GpuChunkKernel,
    GpuRingAttention,
    GpuRowKernel,
    TileProblem,
    enumerate_tiles,
    propose,
)
from unspool_kernels.tiles.solver import Search

ZEN_3 = CpuLimits(
    threads=2, l1d_bytes=32 << 10, l2_bytes=512 << 10, l3_bytes=32 << 20, vector_registers=16, vector_bytes=32
)
MANY_CORES = replace(ZEN_3, threads=64, l1d_bytes=48 << 10, l2_bytes=1 << 20, vector_registers=32, vector_bytes=64)
ORDINARY: list[Any] = [
    GpuRowKernel(slots=1, heads=3, key_features=64, value_channels=64, limits=SM_90),
    GpuRowKernel(slots=64, heads=16, key_features=128, value_channels=128, limits=SM_80),
    GpuRowKernel(slots=64, heads=16, key_features=128, value_channels=128, limits=SM_90),
    GpuChunkKernel(
        sequences=8, heads=16, key_features=128, value_channels=128, element_bytes=4, key_operands=4, limits=SM_80
    ),
    GpuChunkKernel(sequences=1, heads=3, key_features=64, value_channels=64, element_bytes=2, limits=SM_90),
    GpuRingAttention(queries=3, head_dim=64, ring_rows=260, limits=SM_90),
    CpuRowKernel(slots=1, heads=3, key_features=64, value_channels=64, state_bytes=4, queries=3, limits=ZEN_3),
    CpuRowKernel(slots=1, heads=3, key_features=64, value_channels=64, state_bytes=4, queries=3, limits=MANY_CORES),
    CpuRowKernel(slots=8, heads=16, key_features=128, value_channels=128, state_bytes=2, erase=True, limits=ZEN_3),
    CpuPackedProduct(rows=1, inputs=576, outputs=49_152, x_bytes=1, weight_bits=4, limits=ZEN_3),
    CpuPackedProduct(rows=512, inputs=2048, outputs=8192, x_bytes=4, weight_bits=16, limits=MANY_CORES),
]


@pytest.mark.parametrize("problem", ORDINARY, ids=repr)
def test_an_ordinary_problem_is_solved_in_few_steps(problem: TileProblem) -> None:
    search = Search(problem.model())
    assert next(search.solutions()) == propose(problem).values
    assert search.nodes <= 20


@given(st.permutations(ORDINARY))
@settings(max_examples=20, deadline=None)
def test_proposals_do_not_depend_on_what_was_proposed_before(problems: list[TileProblem]) -> None:
    for problem in problems:
        tile = propose(problem)
        assert tile == next(enumerate_tiles(problem))
        assert tile.problem == problem


def test_a_problem_is_solved_once() -> None:
    assert propose(ORDINARY[0]) is propose(replace(ORDINARY[0]))


@pytest.mark.parametrize("problem", ORDINARY, ids=repr)
def test_a_printed_tile_shows_its_choice_and_each_constraint_with_value_and_limit(problem: TileProblem) -> None:
    tile = propose(problem)
    first, *reasons = str(tile).splitlines()
    assert first == f"{type(problem).__name__}: " + " ".join(f"{name}={tile[name]}" for name in tile.values)
    assert [reason.split(":")[0].strip() for reason in reasons] == [c.name for c in problem.model().constraints]


def test_the_reasons_of_a_tile_read_as_arithmetic() -> None:
    text = str(propose(GpuRowKernel(slots=64, heads=16, key_features=128, value_channels=128, limits=SM_90)))
    assert "GpuRowKernel: busy_multiprocessors=132 key_block=128 value_block=32 warps=2" in text
    assert "registers per thread: 191 <= 255 (ceil(2 * value_block * key_block / (32 * warps)) + 63 <= 255)" in text
    assert "busy multiprocessors: 132 == 132" in text
