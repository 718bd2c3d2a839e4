"""The native row kernel takes the tile that the solver proposes, and gives the same bits with any other."""

import pytest
import torch
from torch import Tensor

from unspool_kernels.contract import RowKernel
from unspool_kernels.laws.rows import row_cases
from unspool_kernels.laws.samples import Sizes
from unspool_kernels.native.library import available, instruction_set
from unspool_kernels.native.row_state import RowTile, choose_tile, row_problem, row_state
from unspool_kernels.tiles import propose

pytestmark = pytest.mark.skipif(not available(), reason="this install has no native kernels")

TILES = [RowTile(1, 1), RowTile(1, 32), RowTile(4, 4), RowTile(4, 8), RowTile(4, 128)]
SIZES = [Sizes(), Sizes(lengths=(3, 2), heads=2, group=1, features=300, channels=9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=["narrow", "wide"])
def test_no_tile_changes_a_bit(sizes: Sizes, dtype: torch.dtype) -> None:
    for case in row_cases(sizes):
        case = case.cast(torch.float32, dtype)
        results = []
        for tile in TILES:
            states = {name: state.clone() for name, state in case.states.items()}
            packing = {"slots": case.slots, "cu_seqlens": case.cu_seqlens, "tile": tile}
            output = row_state(**case.tokens, **case.constants, **states, **packing)
            outputs = output if isinstance(output, tuple) else (output,)
            results.append([*outputs, *states.values()])
        for other in results[1:]:
            same = [torch.equal(a, b) for a, b in zip(results[0], other, strict=True)]
            assert all(same), case.name


def chosen(heads: int, keys: int, rows: int, dtype: torch.dtype, kernel: RowKernel) -> tuple[RowTile, Tensor]:
    state = torch.zeros(2, heads, rows, keys, dtype=dtype)
    return choose_tile(2, torch.zeros(2, heads, 1, keys), state, kernel), state


def test_the_solver_proposes_the_tile() -> None:
    tile, state = chosen(4, 64, 64, torch.float16, RowKernel(erase="parallel"))
    machine = (torch.get_num_threads(), instruction_set())
    proposed = propose(row_problem(2, (4, 1, 64), 64, state.element_size(), True, machine))
    assert tile == RowTile(proposed["row_block"], proposed["value_rows"])


def test_a_row_that_is_too_long_for_the_cache_goes_alone() -> None:
    assert chosen(1, 1 << 20, 2, torch.float32, RowKernel())[0] == RowTile(1, 1)
