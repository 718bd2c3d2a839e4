"""Softmax attention with a fixed query as a recurrence over (max, mass, weighted sum): Aaren (arXiv 2405.13956)."""

import math

from torch import Tensor

from unspool_kernels.contract import Arguments, Backend, find_backend, run_reference
from unspool_kernels.reference import softmax_scan as reference

FRESH_SOFTMAX = (-math.inf, 0.0, 0.0)
"""Maximum, mass and weighted sum of `softmax_scan` before the first token."""


def softmax_scan(
    scores: Tensor,
    v: Tensor,
    *,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = sum_{j<=t} e^{s_j} v_j / sum_{j<=t} e^{s_j}.

    scores [N, H] is a gate and may be -inf; v [N, H, V]; state [P, H, V + 2] = (m, u, w): running maximum, mass scaled
    by e^-m, weighted sum scaled likewise; a fresh slot is `FRESH_SOFTMAX`. Returns o [N, H, V] (0 where all scores
    were -inf) and the log-mass m + log u [N, H] in the dtype of the gates.
    """
    args = Arguments(v, check)
    args.input("v", v, "N H V")
    args.gate("scores", scores, "N H", closed=True)
    args.sizes["V+2"] = args.sizes["V"] + 2
    args.state("state", state, "P H V+2")
    args.packing(slots, cu_seqlens)
    module = find_backend(backend, "softmax_scan", [v, scores])
    result: tuple[Tensor, Tensor]
    if module is not None:
        result = module.softmax_scan(scores, v, state=state, slots=slots, cu_seqlens=cu_seqlens)
        return result
    options = {"scores": scores, "v": v, "cu_seqlens": cu_seqlens}
    result = run_reference(reference.softmax_scan, {"state": state}, slots, **options)
    return result
