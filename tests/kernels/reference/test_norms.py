"""Norms and rotary embedding against torch and transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from unspool_kernels.contract import why_missing
from unspool_kernels.ops.norms import l2_norm, rms_norm, rotate

Normal = Callable[..., Tensor]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = why_missing("native", "norms") if request.param == "native" else None
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def close(actual: Tensor, expected: Tensor) -> None:
    error, size = (actual.double() - expected).square().mean().sqrt(), expected.square().mean().sqrt()
    assert error <= TOLERANCE[actual.dtype] * size


def dtypes(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in TOLERANCE if backend == "reference" or dtype != torch.float64]


def test_rms_norm_is_that_of_torch(backend: str, normal: Normal) -> None:
    for dtype in dtypes(backend):
        x, weight = normal(5, 33).to(dtype), normal(33).to(dtype)
        close(rms_norm(x, weight, 1e-5, backend=backend), F.rms_norm(x.double(), (33,), weight.double(), 1e-5))


def test_l2_norm_has_its_eps_inside_the_root(backend: str, normal: Normal) -> None:
    for dtype in dtypes(backend):
        x = (normal(3, 2, 17) * 1e-3).to(dtype)
        wide = x.double()
        close(l2_norm(x, 1e-6, backend=backend), wide / (wide.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert l2_norm(torch.zeros(1, 4), 1e-6, backend=backend).tolist() == [[0.0] * 4]


def test_rotate_is_that_of_llama(backend: str, normal: Normal) -> None:
    angles = normal(5, 4) * 3
    for dtype in dtypes(backend):
        x = normal(5, 3, 8).to(dtype)
        gate = torch.float64 if dtype == torch.float64 else torch.float32
        whole = torch.cat([angles, angles], dim=-1).to(gate).double()
        expected, _ = apply_rotary_pos_emb(x.double(), x.double(), whole.cos(), whole.sin(), unsqueeze_dim=1)
        close(rotate(x, angles.to(gate).cos(), angles.to(gate).sin(), backend=backend), expected)


def test_an_odd_number_of_channels_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="even number of channels"):
        rotate(torch.ones(1, 1, 3), torch.ones(1, 1), torch.ones(1, 1))
