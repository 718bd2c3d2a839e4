"""Integer weights as tensors: the native packer's grid, kept when it is quantised once more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool_kernels.native.library import available
from unspool_kernels.native.packed import PackedMatrix
from unspool_kernels.reference.quantization import GROUP, IntegerFormat, dequantize, parts, quantize

needs_native = pytest.mark.skipif(not available(), reason="the native library was not built")

FORMATS: tuple[IntegerFormat, ...] = ("int8", "int4")


def random_weight(rows: int, columns: int, seed: int, magnitude: int, offset: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + offset
    weight[torch.rand(rows, columns, generator=generator) < 0.2] *= -0.0
    return weight * 2.0**magnitude


weights = st.builds(
    random_weight,
    st.integers(1, 40),
    st.integers(1, 100),
    st.integers(0, 10_000),
    st.integers(-22, 9),  # at 100.0 float16 has no minimum for more
    st.sampled_from([0.0, 0.0, 3.0, 100.0]),
)


@needs_native
@pytest.mark.parametrize("format", FORMATS)
@given(weight=weights)
@settings(max_examples=60, deadline=None)
def test_any_weight_gets_the_value_that_the_native_packer_gives_it(format: IntegerFormat, weight: Tensor) -> None:
    ours = dequantize(quantize(weight, format), weight.shape[1], torch.float32)
    assert torch.equal(ours, PackedMatrix.pack(weight, format).unpack())


@needs_native
@pytest.mark.parametrize("format", FORMATS)
@given(weight=weights)
@settings(max_examples=60, deadline=None)
def test_packing_what_was_quantised_gives_the_bytes_of_packing_the_weight(
    format: IntegerFormat, weight: Tensor
) -> None:
    kept = weight[well_scaled(weight, format)]
    quantised = dequantize(quantize(kept, format), kept.shape[1], torch.float32)
    assert torch.equal(PackedMatrix.pack(quantised, format).data, PackedMatrix.pack(kept, format).data)


def well_scaled(weight: Tensor, format: IntegerFormat) -> Tensor:
    """Which rows have only groups of zeros, and groups that float16 is fine enough for."""
    good = []
    for group in weight.split(GROUP, dim=1):
        peak, spread = group.abs().amax(1), group.amax(1) - group.amin(1)
        fine = peak >= 2.0**-10 if format == "int8" else (spread >= 2.0**-15) & (peak <= 32 * spread)
        good.append(fine | (peak == 0))
    return torch.stack(good).all(0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (4, 33), (2, 63)])
def test_the_tensors_have_the_shapes_and_dtypes_that_are_announced(
    format: IntegerFormat, shape: tuple[int, int]
) -> None:
    matrix = quantize(torch.randn(shape), format)
    stored = {name: (tuple(part.shape), part.dtype) for name, part in matrix._asdict().items() if part is not None}
    assert stored == parts(*shape, format)
    assert dequantize(matrix, shape[1], torch.bfloat16).dtype == torch.bfloat16


def test_the_even_column_is_in_the_low_bits() -> None:
    matrix = quantize(torch.arange(16.0)[None], "int4")
    assert matrix.codes.tolist() == [[low | (low + 1) << 4 for low in range(0, 16, 2)]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_no_scale_can_hold_is_refused(format: IntegerFormat, value: float) -> None:
    weight = torch.randn(4, 40)
    weight[2, 37] = value
    with pytest.raises(ValueError, match=f"{format} cannot keep"):
        quantize(weight, format)
