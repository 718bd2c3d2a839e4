"""Norms and the rotary embedding: one token at a time, no state."""

from torch import Tensor

from unspool_kernels.contract import Arguments, Backend, find_backend
from unspool_kernels.reference import norms as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """weight x / sqrt(mean(x^2) + eps): x [N, C], weight [C]."""
    args = Arguments(x, check=False)
    args.input("x", x, "N C")
    args.input("weight", weight, "C")
    module = find_backend(backend, "norms", [x, weight]) or reference
    result: Tensor = module.rms_norm(x, weight, eps)
    return result


def l2_norm(x: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis of x [..., C]."""
    Arguments(x, check=False).input("x", x, " ".join(f"axis{i}" for i in range(x.dim())))
    module = find_backend(backend, "norms", [x]) or reference
    result: Tensor = module.l2_norm(x, eps)
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Rotary embedding of the pairs (x_i, x_{i + D/2}), as transformers' Llama: x [N, H, D], cos and sin [N, D/2] are
    gates."""
    args = Arguments(x, check=False)
    args.input("x", x, "N H D")
    if args.sizes["D"] % 2:
        raise ValueError(f"x must have an even number of channels, not {args.sizes['D']}")
    args.sizes["D/2"] = args.sizes["D"] // 2
    args.gate("cos", cos, "N D/2")
    args.gate("sin", sin, "N D/2")
    module = find_backend(backend, "norms", [x, cos, sin]) or reference
    result: Tensor = module.rotate(x, cos, sin)
    return result
