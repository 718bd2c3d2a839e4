"""Launches of the norms and the rotary embedding."""

import torch
from torch import Tensor

from unspool_kernels.tiles.gpu import padded
from unspool_kernels.triton.device.norms import norm_rows, rotate_pairs
from unspool_kernels.triton.launch import Argument, Launch, bind, run_all, strided
from unspool_kernels.triton.tiles import norm_row_block, warps_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `ops.rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    run_all(plan_norm(x, weight, eps, y))
    return y


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """As `ops.l2_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    run_all(plan_norm(x.reshape(-1, x.shape[-1]), None, eps, y))
    return y


def plan_norm(x: Tensor, weight: Tensor | None, eps: float, y: Tensor) -> list[Launch]:
    """The launch for rows x [N, C]: of their mean square if there is a weight, else of their sum of squares."""
    rows, channels = x.shape
    width = padded(channels, 1)
    block = norm_row_block(width)
    pool: dict[str, Argument] = {**strided("x", x, "row"), "weight": weight, "y": y, "N": rows, "eps": eps}
    pool |= {"C": channels, "MEAN": weight is not None, "BR": block, "BC": width}
    return [bind(norm_rows, pool, programs=-(-rows // block), warps=warps_for(block * width))]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ops.rotate`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    run_all(plan_rotate(x, cos, sin, y))
    return y


def plan_rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor) -> list[Launch]:
    """The launch for x [N, H, D], cos and sin [N, D / 2]."""
    tokens, heads, channels = x.shape
    half = channels // 2
    pool: dict[str, Argument] = {
        **strided("x", x, "token", "head"),
        **strided("cos", cos, "token"),
        **strided("sin", sin, "token"),
        "y": y,
        "H": heads,
        "HALF": half,
        "BH": padded(heads, 1),
        "BD": padded(half, 1),
    }
    return [bind(rotate_pairs, pool, programs=tokens, warps=warps_for(padded(heads, 1) * padded(half, 1)))]
