"""The row kernel over a V-first matrix state: linear attention, gated, delta-rule and mLSTM mixers by descriptor."""

from typing import overload

import torch
from torch import Tensor

from unspool_kernels.contract import Arguments, Backend, RowKernel, demand, find_backend, run_reference
from unspool_kernels.reference import row_state as reference

__all__ = ["RowKernel", "row_state"]

LOG_DECAY_AXES = {"constant": "H", "scalar": "N H", "key": "N H K", "value": "N H V"}


@overload
def row_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: RowKernel,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    log_decay: Tensor | None = None,
    erase_read: Tensor | None = None,
    erase_write: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: None = None,
    max_state: None = None,
    backend: Backend = "auto",
    check: bool | None = None,
) -> Tensor: ...


@overload
def row_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: RowKernel,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    log_decay: Tensor | None = None,
    erase_read: Tensor | None = None,
    erase_write: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: Tensor,
    max_state: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Tensor]: ...


def row_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: RowKernel,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    log_decay: Tensor | None = None,
    erase_read: Tensor | None = None,
    erase_write: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: Tensor | None = None,
    max_state: Tensor | None = None,
    backend: Backend = "auto",
    check: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = S_{t-1} (diag(a_t) + p_t b_t^T) + v_t k_t^T and o_t = S_t q_t.

    q [N, H, G, K], k [N, H, K], v [N, H, V], state [P, H, R, K] with R = V, or V + 1 with a normalizer (its row, the
    last, is written with v = 1; the caller divides). Returns o [N, H, G, R].
    log_decay (log a, -inf closes): [H] constant, [N, H] scalar, [N, H, K] key, [N, H, V] value (decays rows).
    erase "parallel": beta [N, H], S_t = S~ + beta (v - S~ k) k^T with S~ = S_{t-1} diag(a). erase "general":
    erase_read (p) and erase_write (b) [N, H, K] in the dtype of the inputs.
    read "before": o_t = S_{t-1} q + (q . (bonus k)) v, with bonus [H, K], or without the second term.
    stabilizer: log_input (i) [N, H], -inf closes, and max_state (m) [P, H], -inf in a fresh slot; log_decay is log f.
    The state is then scaled by e^-m, and (o, m [N, H]) is returned, m in the dtype of the gates.
    """
    args = Arguments(q, check)
    args.input("q", q, "N H G K")
    args.input("k", k, "N H K")
    args.input("v", v, "N H V")
    args.sizes["R"] = args.sizes["V"] + kernel.normalizer
    args.state("state", state, "P H R K")
    args.packing(slots, cu_seqlens)
    gates = {"log_decay": log_decay, "beta": beta, "bonus": bonus, "log_input": log_input}
    erase = {"erase_read": erase_read, "erase_write": erase_write}
    _check_options(args, kernel, gates, erase, max_state)
    options = {"kernel": kernel, "cu_seqlens": cu_seqlens, **gates, **erase}
    module = find_backend(backend, "row_state", [q, k, v, *gates.values(), *erase.values()])
    result: Tensor | tuple[Tensor, Tensor]
    if module is not None:
        result = module.row_state(q, k, v, state=state, slots=slots, max_state=max_state, **options)
        return result
    states = {"state": state} if max_state is None else {"state": state, "max_state": max_state}
    result = run_reference(reference.row_state, states, slots, q=q, k=k, v=v, **options)
    return result


def _check_options(
    args: Arguments,
    kernel: RowKernel,
    gates: dict[str, Tensor | None],
    erase: dict[str, Tensor | None],
    max_state: Tensor | None,
) -> None:
    demand("log_decay", gates["log_decay"], kernel.gate != "none")
    demand("beta", gates["beta"], kernel.erase == "parallel")
    demand("log_input", gates["log_input"], kernel.stabilizer)
    demand("max_state", max_state, kernel.stabilizer)
    if kernel.read == "after":
        demand("bonus", gates["bonus"], False)
    axes = {"log_decay": LOG_DECAY_AXES.get(kernel.gate, ""), "beta": "N H", "bonus": "H K", "log_input": "N H"}
    for name, gate in gates.items():
        if gate is not None:
            args.gate(name, gate, axes[name], closed=name.startswith("log"))
    for name, vector in erase.items():
        demand(name, vector, kernel.erase == "general")
        if vector is not None:
            args.input(name, vector, "N H K")
    if max_state is not None:
        args.state("max_state", max_state, "P H")
        if max_state.dtype == torch.float16:
            raise ValueError("max_state must be float32: a log-scale in float16 loses the state's digits")
