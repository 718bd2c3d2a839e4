"""One pass of a model over packed tokens: torch's matrix products between the Triton kernels.

Computes what `decoder.py` and `mixer.py` do, a pool's state updated in place. Positions, slots and lengths are tensors
whose values nothing here asks for, so a pass waits for no device and a CUDA graph can hold it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.decoder import Block
from unspool.far import FarFeatures, hedgehog_features
from unspool.mixer import LinearizedAttention
from unspool.mixer_spec import Gate
from unspool.model import UnspoolForCausalLM
from unspool.norm import RMSNorm
from unspool.packing import PackedContext, PackedTokens
from unspool.rotary import Rotation
from unspool.state import LayerState
from unspool_kernels.ops import norms
from unspool_kernels.ops.ring_attention import ring_attention
from unspool_kernels.ops.row_state import RowKernel, row_state
from unspool_kernels.reference.ring_window import NearOutput, row_of

ROW_GATES: dict[Gate, Literal["none", "scalar", "key"]] = {
    "scalar": "scalar",
    "fixed": "scalar",
    "none": "none",
    "liger": "key",
    "hgrn2": "key",
}
"""The row kernel's gate for the mixer's."""


class Heads(NamedTuple):
    """A layer's projections before the rotation: q [N, H_kv, G, D], k and v [N, H_kv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Written(NamedTuple):
    """What the state is given at each token, float32: keys and values [N, H, D] where `mask` [N] is set, and the key
    of the token itself, which the gate reads."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    gate_keys: Tensor

    def repeat_heads(self, group: int) -> "Written":
        keys, values, gate_keys = (x.repeat_interleave(group, dim=1) for x in (self.keys, self.values, self.gate_keys))
        return Written(keys, values, self.mask, gate_keys)


class PackedDecoder:
    """A model's layers and head over packed tokens."""

    def __init__(self, model: UnspoolForCausalLM) -> None:
        self._model = model
        self._blocks = [block for block in model.model.layers if isinstance(block, Block)]

    def hidden(self, batch: PackedTokens, layers: Sequence[LayerState]) -> Tensor:
        """Final hidden vectors [N, hidden], the layers' slots advanced by the tokens."""
        context = PackedContext.of(batch, self._model.rotary)
        x = F.embedding(batch.tokens, self._model.model.embed_tokens.weight)
        for block, state in zip(self._blocks, layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            mixed = _mix(attention, _project(attention, _norm(block.input_layernorm, x)), context, state)
            x = x + _product(attention.o_proj, mixed.flatten(1).to(x.dtype))
            normed = _norm(block.post_attention_layernorm, x)
            inner = mlp.activation(_product(mlp.gate_proj, normed)) * _product(mlp.up_proj, normed)
            x = x + _product(mlp.down_proj, inner)
        return _norm(self._model.model.norm, x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary]."""
        return _product(self._model.lm_head, hidden)

    def step(self, batch: PackedTokens, layers: Sequence[LayerState]) -> Tensor:
        """Logits [N, vocabulary] of every token."""
        return self.head(self.hidden(batch, layers))


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(layer: RMSNorm, x: Tensor) -> Tensor:
    """Over the last axis of x [N, ..., C]."""
    rows = norms.rms_norm(x.reshape(-1, x.shape[-1]), layer.weight, layer.eps, backend="triton")
    return rows.view(x.shape)


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [N, ..., D], one angle a token."""
    heads = x.reshape(x.shape[0], -1, x.shape[-1])
    return norms.rotate(heads, rotation.cos[:, 0], rotation.sin[:, 0], backend="triton").view(x.shape)


def _project(attention: LinearizedAttention, x: Tensor) -> Heads:
    q = _product(attention.q_proj, x).unflatten(-1, (attention.num_kv_heads, attention.group, -1))
    k = _product(attention.k_proj, x).unflatten(-1, (attention.num_kv_heads, -1))
    v = _product(attention.v_proj, x).unflatten(-1, (attention.num_kv_heads, -1))
    if hasattr(attention, "q_norm"):
        q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
    return Heads(q, k, v)


def _mix(attention: LinearizedAttention, heads: Heads, context: PackedContext, state: LayerState) -> Tensor:
    """The mixed values [N, H_kv, G, D], before the output projection."""
    spec, rows = attention.spec, context.rows
    rotated = Heads(_rotate(heads.q, rows.query), _rotate(heads.k, rows.query), heads.v)
    # First of all: what leaves the window is read before the ring takes its row.
    written = _written(attention, heads, rotated, context, state) if spec.has_state else None
    sink_q = _rotate(heads.q, rows.sink) if spec.sinks else rotated.q
    output, log_mass, row_max = ring_attention(
        rotated.q,
        sink_q,
        rotated.k,
        heads.v,
        keys=state["near_keys"],
        values=state["near_values"],
        positions=context.batch.positions,
        sinks=spec.sinks,
        slots=context.batch.slots,
        cu_seqlens=context.batch.cu_seqlens,
        backend="triton",
    )
    near = output.float()
    if written is None:
        return near
    far = _read_state(attention, (rotated if spec.state_rope else heads).q.float(), written, context, state)
    if spec.join == "mixed":
        return spec.mix * near + (1.0 - spec.mix) * far
    shard = NearOutput(near[:, None], log_mass[:, None], row_max[:, None])
    return attention.join_disjoint(shard, far[:, None], rows)[:, 0]


def _written(
    attention: LinearizedAttention, heads: Heads, rotated: Heads, context: PackedContext, state: LayerState
) -> Written:
    spec, valid = attention.spec, context.rows.valid[:, 0]
    if spec.join == "mixed":
        keys = (rotated if spec.state_rope else heads).k
        return Written(keys.float(), heads.v.float(), valid, heads.k.float())
    keys, values = _leaving(rotated, context, state, spec.window, spec.sinks)
    if not spec.state_rope:
        keys = _rotate(keys, context.rows.unrotate_leaving(spec.window))
    has_left = valid & (context.rows.positions[:, 0] - spec.window >= spec.sinks)
    # A row that was never written may hold anything, NaN too, which no product with zero takes away.
    return Written(keys, values.masked_fill(~has_left[:, None, None], 0.0), has_left, heads.k.float())


def _leaving(
    rotated: Heads, context: PackedContext, state: LayerState, window: int, sinks: int
) -> tuple[Tensor, Tensor]:
    """The keys and values [N, H_kv, D] that leave the window at each token: from the ring, or from this very pass."""
    row = row_of(context.rows.positions[:, 0], window, sinks)
    keys, values = (state[name][context.slot, :, row] for name in ("near_keys", "near_values"))
    if context.batch.longest > window:
        source = (torch.arange(row.shape[0], device=row.device) - window).clamp_min(0)
        in_pass = (context.offset >= window)[:, None, None]
        keys = torch.where(in_pass, rotated.k[source].to(keys.dtype), keys)
        values = torch.where(in_pass, rotated.v[source].to(values.dtype), values)
    return keys.float(), values.float()


def _read_state(
    attention: LinearizedAttention, q: Tensor, written: Written, context: PackedContext, state: LayerState
) -> Tensor:
    """Folds `written` into the layer's state and reads it: [N, H_kv, G, V (+ 1)]."""
    far, spec = attention.far, attention.spec
    assert far is not None
    shape = q.shape[:3]
    if spec.state_heads == "q":
        q, written = q.flatten(1, 2)[:, :, None], written.repeat_heads(attention.group)
    kernel = RowKernel(gate=ROW_GATES[spec.gate], normalizer=spec.normalized)
    log_decay = None if kernel.gate == "none" else far.log_decay(written.gate_keys[:, None])[:, 0]
    if log_decay is not None and kernel.gate == "scalar":
        log_decay = log_decay[..., 0]
    read = row_state(
        _query_features(far, q),
        _key_features(far, written.keys).masked_fill(~written.mask[:, None, None], 0.0),
        written.values,
        kernel=kernel,
        state=state["far"],
        log_decay=log_decay,
        slots=context.batch.slots,
        cu_seqlens=context.batch.cu_seqlens,
        backend="triton",
    )
    return read.view(*shape, -1)


def _query_features(far: FarFeatures, q: Tensor) -> Tensor:
    """q [N, H, G, D] to [N, H, G, K]."""
    if far.spec.feature_map == "hedgehog":
        return _hedgehog(q.flatten(1, 2), far.query_map).view(*q.shape[:3], -1)
    return far.query_features(q[:, None])[:, 0]


def _key_features(far: FarFeatures, k: Tensor) -> Tensor:
    """k [N, H, D] to [N, H, K]."""
    return _hedgehog(k, far.key_map) if far.spec.feature_map == "hedgehog" else far.key_features(k[:, None])[:, 0]


def _hedgehog(x: Tensor, maps: Tensor) -> Tensor:
    """As in `far`, for x [N, H, D] and maps [H, D, D], whose product there would copy the maps for every token."""
    return hedgehog_features((x.transpose(0, 1) @ maps.to(x.dtype)).transpose(0, 1))
