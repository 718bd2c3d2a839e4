"""Norms and the rotary embedding on the triton backend: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from unspool_kernels.contract import why_missing
from unspool_kernels.laws.comparison import TOLERANCE
from unspool_kernels.ops.norms import l2_norm, rms_norm, rotate

MISSING = why_missing("triton", "norms")
if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


def require_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).square().mean().sqrt()
    assert float(error) <= TOLERANCE[actual.dtype] * float(exact.square().mean().sqrt())


@DTYPES
@pytest.mark.parametrize("shape", [(5, 33), (1, 1), (3, 1100), (0, 4)])
def test_rms_norm_agrees_with_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = draw(dtype, *shape), draw(dtype, shape[1])
    exact = rms_norm(x.double(), weight.double(), 1e-6, backend="reference")
    actual = rms_norm(x, weight, 1e-6, backend="triton")
    if shape[0]:
        require_close(actual, exact)
    assert actual.shape == exact.shape


@DTYPES
def test_l2_norm_agrees_with_float64_on_rows_with_gaps_between(dtype: torch.dtype) -> None:
    x = draw(dtype, 3, 2, 20)[:, :, :17]
    require_close(l2_norm(x, 1e-6, backend="triton"), l2_norm(x.double(), 1e-6, backend="reference"))


@DTYPES
def test_rotate_agrees_with_float64(dtype: torch.dtype) -> None:
    x, angles = draw(dtype, 5, 3, 12), draw(torch.float32, 5, 6)
    cos, sin = angles.cos(), angles.sin()
    exact = rotate(x.double(), cos.double(), sin.double(), backend="reference")
    require_close(rotate(x, cos, sin, backend="triton"), exact)
