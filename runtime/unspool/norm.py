"""Root-mean-square normalisation, in float32 as transformers' Llama computes it."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scales the last axis to unit root mean square, times a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
