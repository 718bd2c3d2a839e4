"""Norms and the rotary embedding, on CPUs."""

import ctypes

import torch
from torch import Tensor

from unspool_kernels.native.library import Arguments, address, call
from unspool_kernels.native.operands import integers, operand, optional, pointers


class _Normalize(Arguments):
    function = "normalize"
    _fields_ = [
        *pointers("x weight y"),
        *integers("tokens channels"),
        ("divisor", ctypes.c_double),
        ("eps", ctypes.c_double),
    ]


class _Rotary(Arguments):
    function = "rotary"
    _fields_ = [*pointers("x cosine sine y"), *integers("tokens heads channels")]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `ops.norms.rms_norm`."""
    return _normalize(x, weight, x.shape[-1], eps)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """As `ops.norms.l2_norm`."""
    return _normalize(x, None, 1, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ops.norms.rotate`."""
    inputs, cosine, sine = operand(x), operand(cos), operand(sin)
    y = torch.empty(x.shape)
    call(_Rotary(address(inputs), address(cosine), address(sine), address(y), *x.shape))
    return y.to(x.dtype)


def _normalize(x: Tensor, weight: Tensor | None, divisor: int, eps: float) -> Tensor:
    """weight x / sqrt(sum(x^2) / divisor + eps)."""
    inputs, weights, y, channels = operand(x), optional(weight), torch.empty(x.shape), x.shape[-1]
    tokens = y.numel() // max(channels, 1)
    call(_Normalize(address(inputs), address(weights), address(y), tokens, channels, divisor, eps))
    return y.to(x.dtype)
