"""Packed weights: what the formats keep, and products that do not depend on company, threads or instruction set."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool_kernels.native.library import available, instruction_sets
from unspool_kernels.native.packed import FORMATS, Format, PackedMatrix, packed_bytes

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

# What rounding one weight may cost, relative to the largest of its group.
WEIGHT_ERROR = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.6 / 127, "int4": 3 / 15}
PRODUCT_ERROR = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4, "int8": 1e-2, "int4": 1e-1}


def relative(error: Tensor, exact: Tensor) -> float:
    return float(error.double().norm() / exact.double().norm())


@pytest.mark.parametrize("format", FORMATS)
@given(rows=st.integers(1, 70), columns=st.integers(1, 100), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_unpacking_gives_the_weight_back_to_the_precision_of_the_format(
    format: Format, rows: int, columns: int, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = PackedMatrix.pack(weight, format)
    assert packed.num_bytes == packed_bytes(rows, columns, format)
    assert (packed.unpack() - weight).abs().max() <= WEIGHT_ERROR[format] * weight.abs().max() + 1e-3 * (
        format == "int4"
    )


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_weights_that_lie_on_the_grid_are_kept_exactly(format: Format) -> None:
    once = PackedMatrix.pack(torch.randn(64, 96), format).unpack()
    assert relative(PackedMatrix.pack(once, format).unpack() - once, once) < 1e-3 * (format == "int4") + 1e-7


@pytest.mark.parametrize("format", FORMATS)
def test_special_groups_keep_their_meaning(format: Format) -> None:
    weight = torch.zeros(33, 64)
    weight[1] = 1.0
    weight[2, 5] = -3.0
    weight[32, 63] = 0.5
    unpacked = PackedMatrix.pack(weight, format).unpack()
    torch.testing.assert_close(unpacked, weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("format", FORMATS)
@given(tokens=st.integers(1, 30), rows=st.integers(1, 70), columns=st.integers(1, 150), threads=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_product_is_near_the_exact_one(format: Format, tokens: int, rows: int, columns: int, threads: int) -> None:
    torch.manual_seed(rows * columns)
    weight, x = torch.randn(rows, columns), torch.randn(tokens, columns)
    exact = x.double() @ weight.double().T
    product = PackedMatrix.pack(weight, format).product(x, threads)
    # Sums may cancel and a group shares its scale, so the error is measured against the largest sum there could be.
    scale = columns * x.abs().amax(1, keepdim=True).double() * weight.abs().amax(1).double()
    assert ((product - exact).abs() / scale).max() < PRODUCT_ERROR[format]


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_has_the_same_bits_alone_and_in_any_company(format: Format) -> None:
    weight, x = torch.randn(96, 160), torch.randn(29, 160)
    packed = PackedMatrix.pack(weight, format)
    together = packed.product(x, 2)
    for count in (1, 2, 5, 13):
        parts = torch.cat([packed.product(part, threads) for part in x.split(count) for threads in [1 + count % 2]])
        assert torch.equal(parts, together)


DIGEST = """
import hashlib, sys, torch
from unspool_kernels.native.library import instruction_set
from unspool_kernels.native.packed import FORMATS, PackedMatrix
torch.manual_seed(0)
weight, x = torch.randn(70, 100), torch.randn(9, 100)
digest = hashlib.sha256()
for format in FORMATS:
    packed = PackedMatrix.pack(weight, format)
    digest.update(packed.data.numpy().tobytes() + packed.product(x).contiguous().numpy().tobytes())
print(instruction_set(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {}
    for name in (name for name, runs in instruction_sets().items() if runs):
        monkeypatch.setenv("UNSPOOL_INSTRUCTION_SET", name)
        out = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout.split()
        assert out[0] == name
        digests[name] = out[1]
    assert "scalar" in digests
    assert len(set(digests.values())) == 1, digests


def test_what_cannot_be_packed_or_multiplied_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="format"):
        PackedMatrix.pack(torch.zeros(4, 4), "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight"):
        PackedMatrix.pack(torch.zeros(4), "int8")
    packed = PackedMatrix.pack(torch.zeros(4, 8), "float32")
    with pytest.raises(ValueError, match="x must be"):
        packed.product(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="x must be"):
        packed.product(torch.zeros(1, 8, dtype=torch.float64))
