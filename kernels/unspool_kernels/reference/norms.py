"""Norms and the rotary embedding in plain torch. `ops.norms` has the shapes."""

import torch
from torch import Tensor

from unspool_kernels.reference.packing import widen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = widen(x)
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * widen(weight)).to(x.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    wide = widen(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = widen(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
