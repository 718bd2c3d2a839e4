"""Exact softmax attention over sinks and a sliding window, both kept in one ring of rows per slot."""

from torch import Tensor

from unspool_kernels.contract import Arguments, Backend, find_backend, run_reference
from unspool_kernels.reference import ring_attention as reference


def ring_attention(
    q: Tensor,
    sink_q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    sinks: int,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token sees the first M = `sinks` tokens and the last W, itself among them; scores are scaled by D^-1/2.

    q and sink_q (the query as the sinks see it) [N, H, G, D], k (rotated) and v [N, H, D], keys and values
    [P, H, M + W, D], updated in place; positions int32 [S]: the position of each sequence's first token. Position p
    lives in row p while p < M, else in row M + (p - M) mod W; what other rows hold does not matter. Tokens of one call
    see each other as keys and values store them.
    Returns o [N, H, G, D], and the softmax's log_mass and row_max [N, H, G] in the dtype of the gates.
    """
    args = Arguments(q, check)
    args.input("q", q, "N H G D")
    args.input("sink_q", sink_q, "N H G D")
    args.input("k", k, "N H D")
    args.input("v", v, "N H D")
    args.state("keys", keys, "P H M+W D")
    args.state("values", values, "P H M+W D")
    args.packing(slots, cu_seqlens)
    args.index("positions", positions, "S")
    if not 0 <= sinks < keys.shape[2]:
        raise ValueError(f"sinks must leave a window of at least one of the {keys.shape[2]} rows, not {sinks}")
    if values.dtype != keys.dtype:
        raise ValueError(f"values must be {keys.dtype} as keys, not {values.dtype}")
    if args.check and any(
        position < 0 <= slot for position, slot in zip(*map(_listed, (positions, slots)), strict=True)
    ):
        raise ValueError("positions must not be negative")
    module = find_backend(backend, "ring_attention", [q, sink_q, k, v])
    options = {"positions": positions, "sinks": sinks, "cu_seqlens": cu_seqlens}
    result: tuple[Tensor, Tensor, Tensor]
    if module is not None:
        result = module.ring_attention(q, sink_q, k, v, keys=keys, values=values, slots=slots, **options)
        return result
    states = {"keys": keys, "values": values}
    result = run_reference(reference.ring_attention, states, slots, q=q, sink_q=sink_q, k=k, v=v, **options)
    return result


def _listed(tensor: Tensor) -> list[int]:
    entries: list[int] = tensor.tolist()
    return entries
