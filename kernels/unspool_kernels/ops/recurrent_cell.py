"""Recurrent cells whose state passes through a nonlinearity, with a recurrent matrix per head: step by step only."""

import math
from typing import Literal

from torch import Tensor

from unspool_kernels.contract import Arguments, Backend, find_backend, run_reference
from unspool_kernels.reference import recurrent_cell as reference

Cell = Literal["elman", "lstm", "gru", "slstm"]

GATES: dict[Cell, str] = {"elman": "1", "lstm": "4", "gru": "3", "slstm": "4"}
FRESH: dict[Cell, tuple[float, ...]] = {
    "elman": (0.0,),
    "lstm": (0.0, 0.0),
    "gru": (0.0,),
    "slstm": (0.0, 0.0, 0.0, -math.inf),
}
"""What each state of a cell holds before the first token: h; h, c; h; h, c, n, m."""


def recurrent_cell(
    x: Tensor,
    weight: Tensor,
    *,
    cell: Cell,
    bias: Tensor | None = None,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> Tensor:
    """h_t from the pre-activations x_t [N, H, gates, D] (W x + b) and R h_{t-1} + bias.

    weight (R) [H, gates, D out, D in] and bias [H, gates, D] in the dtype of x; state [P, H, len(FRESH[cell]), D].
    Gates in torch.nn's order: elman one, tanh; lstm i, f, g, o; gru r, z, n with bias inside r * (.); slstm i, f, z, o
    with m' = max(logsigmoid(f) + m, i) and h = sigmoid(o) c / n. Returns h [N, H, D].
    """
    if cell not in GATES:
        raise ValueError(f"cell must be one of {', '.join(GATES)}, not {cell!r}")
    args = Arguments(x, check)
    args.input("x", x, f"N H {GATES[cell]} D")
    args.input("weight", weight, f"H {GATES[cell]} D D")
    if bias is not None:
        args.input("bias", bias, f"H {GATES[cell]} D")
    args.state("state", state, f"P H {len(FRESH[cell])} D")
    args.packing(slots, cu_seqlens)
    module = find_backend(backend, "recurrent_cell", [x, weight, bias])
    options = {"cell": cell, "bias": bias, "cu_seqlens": cu_seqlens}
    result: Tensor
    if module is not None:
        result = module.recurrent_cell(x, weight, state=state, slots=slots, **options)
        return result
    result = run_reference(reference.recurrent_cell, {"state": state}, slots, x=x, weight=weight, **options)
    return result
