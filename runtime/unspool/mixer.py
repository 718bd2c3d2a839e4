"""The token mixer of a converted layer: exact softmax over the near set, a gated state for what left it, their join.

One module for every preset; `MixerSpec` says which kernel, gate, feature map and join it runs. See `docs/layer.md`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unspool import near
from unspool.batch import StepContext
from unspool.config import UnspoolConfig
from unspool.far import FarFeatures
from unspool.linear import Linear
from unspool.mixer_spec import MixerSpec
from unspool.norm import RMSNorm
from unspool.state import LayerState
from unspool_kernels.reference import gated_state, ring_window, slot_memory
from unspool_kernels.reference.merge import merge

SMALLEST_MASS = 1e-30


class Heads(NamedTuple):
    """A layer's projections: q [B, T, H_kv, G, D], k and v [B, T, H_kv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class LinearizedAttention(nn.Module):
    """x [B, T, hidden] to [B, T, hidden]; reads and advances the slots that the context names."""

    def __init__(self, config: UnspoolConfig, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        hidden, channels = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * channels, config.num_key_value_heads * channels
        self.q_proj = Linear(hidden, queries, bias=config.attention_bias)
        self.k_proj = Linear(hidden, keys, bias=config.attention_bias)
        self.v_proj = Linear(hidden, keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, hidden, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(channels, config.rms_norm_eps)
            self.k_norm = RMSNorm(channels, config.rms_norm_eps)
        self.far = FarFeatures(config, spec) if spec.has_state else None

    def forward(self, x: Tensor, context: StepContext, state: LayerState | None = None) -> Tensor:
        return self.project_out(self.mix(self.project(x), context, state), x.dtype)

    def project(self, x: Tensor) -> Heads:
        """Queries, keys and values before the rotation."""
        q = self.q_proj(x).unflatten(-1, (self.num_kv_heads, self.group, -1))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return Heads(q, k, v)

    def project_out(self, mixed: Tensor, dtype: torch.dtype) -> Tensor:
        output: Tensor = self.o_proj(mixed.flatten(2).to(dtype))
        return output

    def mix(self, heads: Heads, context: StepContext, state: LayerState | None = None) -> Tensor:
        """The mixed values [B, T, H_kv, G, D], before the output projection."""
        if self.far is None:
            return self.attend_near(heads, context, state).output.values
        exact, far = self.attend_both(heads, context, state)
        if self.spec.join == "mixed":
            return self.spec.mix * exact.values + (1.0 - self.spec.mix) * far
        return self.join_disjoint(exact, far, context)

    def attend_both(
        self, heads: Heads, context: StepContext, state: LayerState | None = None
    ) -> tuple[ring_window.NearOutput, Tensor]:
        """The near part, and the state's read-out [B, T, H_kv, G, D], with its mass as one more channel where the
        state is normalised."""
        part = self.attend_near(heads, context, state)
        return part.output, self.read_state(heads.q, self.tokens_for_state(heads, part, context), context, state)

    def attend_near(self, heads: Heads, context: StepContext, state: LayerState | None) -> near.NearPart:
        """Softmax over sinks, window and bank; writes the tokens into them when there is a state."""
        q, k = context.query.apply(heads.q), context.query.apply(heads.k)
        rotated = near.RotatedHeads(q, context.sink.apply(heads.q), k, heads.v)
        return near.attend(rotated, self.spec, self.far.bank if self.far is not None else None, context, state)

    def join_disjoint(self, exact: ring_window.NearOutput, far: Tensor, context: StepContext) -> Tensor:
        """Merges the near shard with the far one [B, T, H_kv, G, V + 1], whose last channel is its mass."""
        assert self.far is not None
        mass = far[..., -1].clamp_min(SMALLEST_MASS)
        bias = self.far.bias.to(mass.dtype).view(self.num_kv_heads, self.group)
        has_far = context.positions >= self.spec.near_tokens
        far_log_mass = torch.where(has_far[..., None, None], mass.double().log() + bias, -torch.inf)
        return merge(exact.values, self.near_log_mass(exact), far[..., :-1] / mass[..., None], far_log_mass)

    def near_log_mass(self, exact: ring_window.NearOutput) -> Tensor:
        """What the near part weighs in the disjoint join [B, T, H_kv, G]."""
        return exact.log_mass - exact.row_max if self.spec.near_mass == "row_max" else exact.log_mass

    def read_state(self, q: Tensor, written: "StateTokens", context: StepContext, state: LayerState | None) -> Tensor:
        """Folds `written` into the layer's state and reads it with q: [B, T, H_kv, G, V (+ 1)]."""
        assert self.far is not None
        q = written.keep_dtype(context.query.apply(q) if self.spec.state_rope else q)
        if self.spec.state_heads == "q":
            q = q.flatten(2, 3)[:, :, :, None]
            written = written.repeat_heads(self.group)
        log_decay = self.far.log_decay(written.gate_keys) * context.valid[..., None, None]
        read = self._read_slots if self.spec.memory == "slots" else self._read_matrix
        return read(q, written, log_decay, context, state).reshape(*q.shape[:2], self.num_kv_heads, self.group, -1)

    def _read_matrix(
        self, q: Tensor, written: "StateTokens", log_decay: Tensor, context: StepContext, state: LayerState | None
    ) -> Tensor:
        assert self.far is not None
        q = self.far.query_features(q)
        k = self.far.key_features(written.keys) * written.mask[..., None, None]
        v = torch.cat([written.values, torch.ones_like(written.values[..., :1])], -1)
        v = v if self.spec.normalized else written.values
        if state is None:
            start = q.new_zeros(q.shape[0], q.shape[2], v.shape[-1], k.shape[-1])
            return gated_state.chunk(q, k, v, log_decay, start)[0]
        assert context.rows is not None
        start = context.rows.read(state["far"])
        if context.is_step:
            output, end = gated_state.step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], start)
            output = output[:, None]
        else:
            output, end = gated_state.chunk(q, k, v, log_decay, start)
        context.rows.write(state["far"], end)
        return output

    def _read_slots(
        self, q: Tensor, written: "StateTokens", log_decay: Tensor, context: StepContext, state: LayerState | None
    ) -> Tensor:
        k, v, scale = written.keys, written.values, q.shape[-1] ** -0.5
        if state is None:
            empty = k.new_zeros(k.shape[0], k.shape[2], log_decay.shape[-1], k.shape[-1])
            return slot_memory.chunk(q, k, v, log_decay, empty, empty, scale)[0]
        assert context.rows is not None
        slots = context.rows.read(state["slot_keys"]), context.rows.read(state["slot_values"])
        if context.is_step:
            output, *ends = slot_memory.step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], *slots, scale)
            output = output[:, None]
        else:
            output, *ends = slot_memory.chunk(q, k, v, log_decay, *slots, scale)
        context.rows.write(state["slot_keys"], ends[0])
        context.rows.write(state["slot_values"], ends[1])
        return output

    def tokens_for_state(self, heads: Heads, part: near.NearPart, context: StepContext) -> "StateTokens":
        """What the state is given: every token in a mixed join, else those that left the near set."""
        if self.spec.join == "mixed":
            keys = context.query.apply(heads.k) if self.spec.state_rope else heads.k
            return StateTokens.of(keys, heads.v, context.valid, heads.k)
        keys = part.left_keys if self.spec.state_rope else near.unrotated_left_keys(part, self.spec, context)
        return StateTokens.of(keys, part.left_values, part.left, heads.k)


class StateTokens(NamedTuple):
    """What the state is given at each token: keys and values [B, T, H, D] where the mask [B, T] is set, and the key of
    the token itself, which the gate reads. Float32 or wider."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    gate_keys: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, mask: Tensor, gate_keys: Tensor) -> "StateTokens":
        dtype = torch.promote_types(values.dtype, torch.float32)
        return cls(keys.to(dtype), values.to(dtype), mask, gate_keys.to(dtype))

    def keep_dtype(self, q: Tensor) -> Tensor:
        return q.to(self.values.dtype)

    def repeat_heads(self, group: int) -> "StateTokens":
        """One state per query head: each key-value head's tokens, once for every query that reads them."""
        keys, values, gate_keys = (x.repeat_interleave(group, dim=2) for x in (self.keys, self.values, self.gate_keys))
        return StateTokens(keys, values, self.mask, gate_keys)
