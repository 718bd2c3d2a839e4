"""What float16 states lose over a long text, on the native kernels: rounding errors stay as small as they began."""

import pytest
import torch
from torch import Tensor

from unspool_kernels.contract import RowKernel
from unspool_kernels.native.library import available
from unspool_kernels.ops.row_state import row_state

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

STEPS, HEADS, CHANNELS = 4096, 4, 64
END = 512
KERNELS = {
    # name: kernel, decay, largest relative error over the first and over the last END tokens
    "gated delta rule": (RowKernel(gate="scalar", erase="parallel"), 0.99, 1.5e-3, 1.5e-3),
    "scalar gate": (RowKernel(gate="scalar"), 0.999, 3e-3, 6e-3),
}


def read(kernel: RowKernel, decay: float, dtype: torch.dtype) -> Tensor:
    """[tokens, heads, channels]: one token a call, as decoding goes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(STEPS, HEADS, CHANNELS, generator=generator) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    state = torch.zeros(1, HEADS, CHANNELS, CHANNELS, dtype=dtype)
    slots, one = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    log_decay = torch.full((1, HEADS), decay).log()
    beta = torch.full((1, HEADS), 0.5) if kernel.erase == "parallel" else None
    outputs = []
    for token in range(STEPS):
        at = slice(token, token + 1)
        o = row_state(
            q[at, :, None],
            k[at],
            v[at],
            kernel=kernel,
            state=state,
            slots=slots,
            cu_seqlens=one,
            log_decay=log_decay,
            beta=beta,
            backend="native",
        )
        outputs.append(o[0] if isinstance(o, tuple) else o)
    return torch.cat(outputs)[:, :, 0]


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    return float((approximate - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", KERNELS)
def test_float16_states_drift_no_further_than_their_band(name: str) -> None:
    kernel, decay, first, last = KERNELS[name]
    exact, half = read(kernel, decay, torch.float32), read(kernel, decay, torch.float16)
    errors = relative_error(half[:END], exact[:END]), relative_error(half[-END:], exact[-END:])
    assert 0 < errors[0] <= first, errors
    assert errors[1] <= last, errors
