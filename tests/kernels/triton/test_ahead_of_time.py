"""Kernels compiled for GPUs that are not here: none spills, all fit, and lengths compile nothing anew."""

import importlib
import os
import pkgutil
from collections.abc import Iterator

import pytest

from unspool_kernels.triton import NOT_INSTALLED

pytest.importorskip("triton", reason=NOT_INSTALLED)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

import triton

from unspool_kernels.contract import RowKernel
from unspool_kernels.tiles import SM_80, SM_90
from unspool_kernels.triton import device
from unspool_kernels.triton.ahead_of_time import LIMITS, measure, specialize
from unspool_kernels.triton.launch import Launch
from unspool_kernels.triton.shipped import (
    ROW_CALLS,
    RowCall,
    ShippedCall,
    Traffic,
    pointwise_calls,
    ring_launches,
    row_launches,
    shipped_calls,
    softmax_launches,
)


def kernels() -> set[str]:
    """The kernels by name: jitted functions that are launched, unlike the pieces these are made of."""
    modules = [
        importlib.import_module(f"{device.__name__}.{module.name}") for module in pkgutil.iter_modules(device.__path__)
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)]
    return {kernel.__name__ for kernel in found if "slots" in kernel.arg_names or "x" in kernel.arg_names}


def representatives(capability: int) -> dict[str, tuple[ShippedCall, Launch]]:
    """The last shipped launch of every kernel, by its name: of the largest traffic."""
    calls = list(shipped_calls(LIMITS[capability]))
    return {launch.kernel.__name__: (call, launch) for call in calls for launch in call.launches}


def test_every_kernel_is_shipped() -> None:
    assert set(representatives(80)) == kernels()


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("name", sorted(kernels()))
def test_no_kernel_spills_or_takes_too_much_shared_memory(name: str, capability: int) -> None:
    call, launch = representatives(capability)[name]
    found = measure(call.name, launch, capability)
    assert found.spilled_bytes == 0, found
    assert 0 < found.registers <= LIMITS[capability].registers_per_thread
    assert found.shared_bytes <= LIMITS[capability].shared_bytes, found


def every_launch(traffic: Traffic) -> Iterator[Launch]:
    for call in ROW_CALLS.values():
        yield from row_launches(call, traffic, SM_90)
    yield from softmax_launches(traffic)
    yield from ring_launches(traffic, 3, 64, SM_90)
    for shipped in pointwise_calls(traffic):
        yield from shipped.launches


@pytest.mark.parametrize("lengths", [(4096, 4099), (32, 1 << 20), (2, 3)])
def test_another_number_of_tokens_compiles_nothing_anew(lengths: tuple[int, int]) -> None:
    short, long = (list(every_launch(Traffic(tokens=tokens, sequences=2))) for tokens in lengths)
    assert [launch.kernel.__name__ for launch in short] == [launch.kernel.__name__ for launch in long]
    for one, other in zip(short, long, strict=True):
        assert (specialize(one), one.warps) == (specialize(other), other.warps), one.kernel.__name__


def test_few_sequences_get_smaller_blocks_than_many() -> None:
    alone, many = (
        row_launches(ROW_CALLS["SSD"], Traffic(tokens=n, sequences=n), SM_80)[0].arguments["BR"] for n in (1, 64)
    )
    assert isinstance(alone, int) and isinstance(many, int)
    assert alone < many


def test_keys_too_wide_for_the_registers_are_refused_by_name() -> None:
    kernel = RowKernel(gate="scalar")
    once = Traffic(tokens=1, sequences=1)
    assert row_launches(RowCall(kernel=kernel, sizes=(1, 1, 2048, 64)), once, SM_80)[0].arguments["BK"] == 2048
    with pytest.raises(ValueError, match="k: the triton backend holds 2048 key features, not 2049"):
        row_launches(RowCall(kernel=kernel, sizes=(1, 1, 2049, 64)), once, SM_80)
