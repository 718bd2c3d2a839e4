"""Attention over sinks and a window, on CPUs: the ring is a softmax in shards of fixed rows, merged in order."""

import torch
from torch import Tensor

from unspool_kernels.native.library import Arguments, address, call
from unspool_kernels.native.operands import SequencesArgument, integers, layout, operand, pointers, sequences


class _RingAttention(Arguments):
    function = "ring_attention"
    _fields_ = [
        ("sequences", SequencesArgument),
        *pointers("positions q sink_q k v keys values o log_mass row_max shards"),
        *integers("heads queries channels rows sinks keys_stride values_stride state_format workspace"),
    ]


class _Workspace(_RingAttention):
    function = "ring_attention_workspace"


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.ring_attention`."""
    tokens, heads, queries, channels = q.shape
    inputs = {"q": operand(q), "sink_q": operand(sink_q), "k": operand(k), "v": operand(v)}
    outputs = {name: torch.empty(tokens, heads, queries) for name in ("log_mass", "row_max")}
    outputs["o"] = torch.empty(q.shape)
    fields = {
        "sequences": sequences(slots, cu_seqlens),
        **{name: address(tensor) for name, tensor in (inputs | outputs).items()},
        **{"positions": address(positions), "keys": address(keys), "values": address(values)},
        **{"heads": heads, "queries": queries, "channels": channels, "rows": keys.shape[2], "sinks": sinks},
        **{"keys_stride": keys.stride(0), "values_stride": values.stride(0)},
        "state_format": layout(keys)["state_format"],
    }
    size = _Workspace(**fields)
    call(size)
    shards = torch.empty(size.workspace)
    call(_RingAttention(**fields, shards=address(shards)))
    return outputs["o"].to(q.dtype), outputs["log_mass"], outputs["row_max"]
