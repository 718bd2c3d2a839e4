"""First-order scans, one state per channel and feature: S6, S4D, EMA, RG-LRU, HGRN, minGRU; and RWKV-4's."""

import math

from torch import Tensor

from unspool_kernels.contract import Arguments, Backend, find_backend, run_reference
from unspool_kernels.reference import diagonal_scan as reference

FRESH_EXPONENTIAL = (0.0, 0.0, -math.inf)
"""Numerator, denominator and maximum of `exponential_scan` before the first token."""


def diagonal_scan(
    x: Tensor,
    decay: Tensor,
    *,
    read: Tensor | None = None,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> Tensor:
    """h_t = a_t h_{t-1} + x_t, elementwise; a may be negative.

    x [N, C, M]; decay (a itself, a gate) [N, C, M], or [C, M] when constant; state [P, C, M]; read, in the dtype of x,
    [N, 1, M] per token or [C, M] constant. Returns h [N, C, M], or y [N, C] = sum_m read h. When state has a last axis
    of 2 all are complex, as (real, imaginary) pairs on a last axis, and y = 2 Re(sum_m read h) is real.
    """
    pair = " 2" if state.dim() == 4 else ""
    per_token = 3 + len(pair) // 2
    args = Arguments(x, check)
    args.input("x", x, "N C M" + pair)
    args.gate("decay", decay, ("N C M" if decay.dim() == per_token else "C M") + pair)
    if read is not None:
        args.input("read", read, ("N 1 M" if read.dim() == per_token else "C M") + pair)
    args.state("state", state, "P C M" + pair)
    args.packing(slots, cu_seqlens)
    module = find_backend(backend, "diagonal_scan", [x, decay, read])
    result: Tensor
    if module is not None:
        result = module.diagonal_scan(x, decay, read=read, state=state, slots=slots, cu_seqlens=cu_seqlens)
        return result
    options = {"x": x, "decay": decay, "read": read, "cu_seqlens": cu_seqlens}
    result = run_reference(reference.diagonal_scan, {"state": state}, slots, **options)
    return result


def exponential_scan(
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor,
    bonus: Tensor,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> Tensor:
    """RWKV-4: y_t = (A + e^{bonus + k_t} v_t) / (B + e^{bonus + k_t}), then A <- e^decay A + e^{k_t} v_t, B likewise.

    k and v [N, C]; decay (log, below 0) and bonus [C] are gates; state [P, C, 3] holds A and B scaled by e^-max, and
    max; a fresh slot is `FRESH_EXPONENTIAL`. Returns y [N, C].
    """
    args = Arguments(k, check)
    args.input("k", k, "N C")
    args.input("v", v, "N C")
    args.gate("decay", decay, "C")
    args.gate("bonus", bonus, "C")
    args.state("state", state, "P C 3")
    args.packing(slots, cu_seqlens)
    module = find_backend(backend, "diagonal_scan", [k, v, decay, bonus])
    options = {"decay": decay, "bonus": bonus, "cu_seqlens": cu_seqlens}
    result: Tensor
    if module is not None:
        result = module.exponential_scan(k, v, state=state, slots=slots, **options)
        return result
    result = run_reference(reference.exponential_scan, {"state": state}, slots, k=k, v=v, **options)
    return result
