"""The far part's parameters and pre-processing: feature maps of queries and keys, and the gate, from tables by name.

A gate gives log-decays [B, T, H, 1 or K] <= 0 from the unrotated key of the current token; no gate adds a projection
of the hidden state (Liger, arXiv 2503.01496).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.bank import BankPriority
from unspool.config import UnspoolConfig
from unspool.mixer_spec import MixerSpec
from unspool.state import feature_size, state_heads

INITIAL_HALF_LIFE = 512.0
"""Tokens after which an uncalibrated scalar or fixed gate has halved the state."""


class FarFeatures(nn.Module):
    """Learned feature maps [H, D, D], scalar gate [H_state, D], log-weight [H] and bank of one layer's far part.

    Only what the layer's `MixerSpec` uses exists as a parameter.
    """

    def __init__(self, config: UnspoolConfig, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_features = feature_size(config, spec)
        heads, channels = state_heads(config, spec), config.head_dim
        if spec.feature_map == "hedgehog":
            self.query_map = nn.Parameter(torch.empty(config.num_attention_heads, channels, channels))
            self.key_map = nn.Parameter(torch.empty(heads, channels, channels))
        if spec.gate == "scalar":
            self.gate_weight = nn.Parameter(torch.empty(heads, channels))
        if spec.gate in ("scalar", "fixed"):
            self.gate_bias = nn.Parameter(torch.empty(heads))
        if spec.join == "disjoint":
            self.bias = nn.Parameter(torch.empty(config.num_attention_heads))
        self.bank = BankPriority(config) if spec.bank else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity feature maps, a gate with INITIAL_HALF_LIFE whatever the key, the spec's far_bias, and a bank of the
        last tokens."""
        if self.bank is not None:
            self.bank.reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_map"):
                parameter.copy_(torch.eye(parameter.shape[-1], device=parameter.device).expand_as(parameter))
            elif name == "gate_weight":
                parameter.zero_()
            elif name == "gate_bias":
                parameter.fill_(gate_logit(INITIAL_HALF_LIFE))
            else:
                parameter.fill_(self.spec.far_bias)

    def query_features(self, q: Tensor) -> Tensor:
        """[B, T, H_state, G, D] to [B, T, H_state, G, K]."""
        hedgehog = self.spec.feature_map == "hedgehog"
        weight = self.query_map.to(q.dtype).unflatten(0, q.shape[2:4]) if hedgehog else None
        return FEATURE_MAPS[self.spec.feature_map](q, weight)

    def key_features(self, k: Tensor) -> Tensor:
        """[B, T, H_state, D] to [B, T, H_state, K]."""
        if self.spec.gate == "hgrn2":
            return (-k).sigmoid()  # 1 - gate, from the logit so that no bit is lost
        weight = self.key_map.to(k.dtype) if self.spec.feature_map == "hedgehog" else None
        return FEATURE_MAPS[self.spec.feature_map](k, weight)

    def log_decay(self, k: Tensor) -> Tensor:
        """[B, T, H_state, D] to [B, T, H_state, 1], [..., K], or [..., M] for slot memory."""
        return GATES[self.spec.gate](self, k)


def gate_logit(half_life: float) -> float:
    """The logit of the decay that halves a state in that many tokens."""
    log_decay = -math.log(2.0) / half_life
    return log_decay - math.log(-math.expm1(log_decay))


def _hedgehog(x: Tensor, weight: Tensor | None) -> Tensor:
    assert weight is not None
    return hedgehog_features((x[..., None, :] @ weight).squeeze(-2))


def hedgehog_features(projected: Tensor) -> Tensor:
    """[..., D] to [..., 2 D] (arXiv 2402.04347, equation 6), of what each head's map made of a query or key."""
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1).clamp_min(1e-12)


FEATURE_MAPS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "hedgehog": _hedgehog,
    "softmax": lambda x, _: x.softmax(-1),
    "elu": lambda x, _: F.elu(x) + 1.0,
    "identity": lambda x, _: x,
}


def _scalar_gate(far: FarFeatures, k: Tensor) -> Tensor:
    weight, bias = far.gate_weight.to(k.dtype), far.gate_bias.to(k.dtype)
    logit = (k * weight).sum(-1, keepdim=True) + bias[:, None]
    return F.logsigmoid(logit.double()).to(k.dtype)  # float64: one number a head must round alike in any batch


def _fixed_gate(far: FarFeatures, k: Tensor) -> Tensor:
    return F.logsigmoid(far.gate_bias.to(k.dtype))[:, None].expand(*k.shape[:3], 1)


def _no_gate(far: FarFeatures, k: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:3], 1)


def _liger_gate(far: FarFeatures, k: Tensor) -> Tensor:
    if far.spec.memory == "slots" and far.spec.num_slots:
        heads = k.shape[2]
        k = F.adaptive_avg_pool1d(k.flatten(2), heads * far.spec.num_slots).unflatten(2, (heads, far.spec.num_slots))
    return _per_feature(far, F.logsigmoid(k) / far.spec.gate_normalizer)


def _hgrn2_gate(far: FarFeatures, k: Tensor) -> Tensor:
    return F.logsigmoid(k)


def _per_feature(far: FarFeatures, log_gate: Tensor) -> Tensor:
    if far.spec.memory == "slots" or far.num_features == log_gate.shape[-1]:
        return log_gate
    return log_gate.repeat(1, 1, 1, far.num_features // log_gate.shape[-1])  # both halves of a hedgehog map


GATES: dict[str, Callable[[FarFeatures, Tensor], Tensor]] = {
    "scalar": _scalar_gate,
    "fixed": _fixed_gate,
    "none": _no_gate,
    "liger": _liger_gate,
    "hgrn2": _hgrn2_gate,
}
