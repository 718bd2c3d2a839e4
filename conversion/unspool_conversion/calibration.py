"""Sets the far part's gate and weight from the teacher's attention, without gradients, one layer in memory at a time.

For every calibrated layer the teacher's attention output on text is the target. Each key-value head gets the half-life,
where its gate has one, and each query head the log-weight of its far part, that bring the layer nearest to it; "off" is
a candidate, and every other must not be worse than the window alone in any range of positions. So calibration cannot
make a head's output on its text worse than the window's. Matching the teacher's attention mass instead makes long
texts far worse: mass is not output error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.batch import StepContext, step_context
from unspool.config import UnspoolConfig
from unspool.decoder import Block
from unspool.errors import UserError
from unspool.far import FarFeatures, gate_logit
from unspool.mixer import SMALLEST_MASS, Heads, LinearizedAttention
from unspool.mixer_spec import MixerSpec
from unspool.rotary import Rotary
from unspool_conversion.bank_calibration import BankText, calibrate_bank, output_gram
from unspool_kernels.reference.ring_window import NearOutput

HALF_LIVES = (64.0, 256.0, 1024.0)
BIASES = tuple(half / 2 for half in range(-12, 9))
"""Log-weights to try. Above 4 the far part fits the calibration text's own subject and other texts lose."""
OFF = -20.0
"""The log-weight of a far part that calibration found no use for."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Teacher:
    """What calibration reads: the converted model's configuration, its tensors by name, and each layer's own sliding
    window in the teacher, where it has one."""

    config: UnspoolConfig
    load: Callable[[str], Tensor]
    windows: Sequence[int | None]


@dataclass(frozen=True)
class Calibration:
    """The new parameters by full name, float32, and what was chosen for each layer."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]


def is_calibrated(spec: MixerSpec) -> bool:
    """Whether a layer has a far part whose weight calibration finds: LoLCATs publishes its own, a mixed join is an
    average with a given share, and a window has none."""
    return spec.join == "disjoint" and spec.near_mass == "softmax"


def calibrated_specs(config: UnspoolConfig) -> list[MixerSpec]:
    """The mixers of the layers that calibration fits."""
    return [spec for spec in config.mixer_specs() if is_calibrated(spec)]


def initial_parameters(config: UnspoolConfig) -> dict[str, Tensor]:
    """The new parameters as they are before any calibration."""
    tensors: dict[str, Tensor] = {}
    for layer, spec in enumerate(config.mixer_specs()):
        if spec.has_state:
            tensors |= _named(layer, FarFeatures(config, spec))
    return tensors


@torch.inference_mode()
def calibrate(teacher: Teacher, tokens: Tensor, progress: Progress) -> Calibration:
    """Calibrates on tokens [sequences, length]; `progress` is told (layers done, layers). Layers that are not
    calibrated keep their initial parameters.

    Sequences no longer than the near set have no far tokens: they leave every far part off. Raises UserError when
    weights or activations are not finite.
    """
    config = teacher.config
    rotary = Rotary(config)
    context = step_context((tokens.shape[0], tokens.shape[1]), rotary, torch.float32, tokens.device)
    x = F.embedding(tokens, teacher.load("model.embed_tokens.weight")).float()
    tensors: dict[str, Tensor] = {}
    reports: list[dict[str, Any]] = []
    for layer, spec in enumerate(config.mixer_specs()):
        block = _load_block(teacher, spec, layer)
        heads = block.self_attn.project(block.input_layernorm(x))
        target = teacher_attention(heads, context, teacher.windows[layer])
        if block.self_attn.far is not None:
            if is_calibrated(spec):
                window = teacher.windows[layer]
                reports.append({"layer": layer} | _calibrate_layer(block.self_attn, heads, target, context, window))
                _check_finite(reports[-1])
            tensors |= _named(layer, block.self_attn.far)
        x = block.feed_forward(x + block.self_attn.project_out(target, x.dtype))
        progress(layer + 1, config.num_hidden_layers)
    report = {"sequences": tokens.shape[0], "length": tokens.shape[1], "layers": reports}
    return Calibration(tensors, report)


def teacher_attention(heads: Heads, context: StepContext, window: int | None) -> Tensor:
    """Causal softmax attention [B, T, H_kv, G, D] over the whole text or a window: the layer before its conversion."""
    q, k = context.query.apply(heads.q), context.query.apply(heads.k)
    keys, values = (x.transpose(1, 2).repeat_interleave(q.shape[3], dim=1) for x in (k, heads.v))
    queries, length = q.flatten(2, 3).transpose(1, 2), q.shape[1]
    if window is None or window >= length:
        output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    else:
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
    return output.transpose(1, 2).reshape(q.shape)


def _named(layer: int, far: FarFeatures) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}.self_attn.far."
    return {prefix + name: parameter.detach().float() for name, parameter in far.named_parameters()}


def _load_block(teacher: Teacher, spec: MixerSpec, layer: int) -> Block:
    """One layer with the teacher's weights in float32 and initial far parameters."""
    with torch.device("meta"):
        block = Block(teacher.config, spec)
    weights = {
        name: _load_finite(teacher, f"model.layers.{layer}.{name}")
        for name, _ in block.named_parameters()
        if not name.startswith("self_attn.far.")
    }
    block.load_state_dict(weights, strict=False, assign=True)
    if block.self_attn.far is not None:
        block.self_attn.far = FarFeatures(teacher.config, spec)
    return block


def _load_finite(teacher: Teacher, name: str) -> Tensor:
    weight = teacher.load(name)
    if not bool(weight.isfinite().all()):
        raise UserError(f"{name} holds NaN or infinite values; download the checkpoint again")
    return weight.float()


def _check_finite(report: dict[str, Any]) -> None:
    if not math.isfinite(report["error_of_window_only"]):
        raise UserError(
            f"layer {report['layer']} computes NaN or infinite values on the calibration text; check the checkpoint, "
            "or pass another --calibration text"
        )


class _OutputError(NamedTuple):
    """The squared output error of near + p (far - near) as near + 2 p cross + p^2 difference, each [B, T, H_kv, G]."""

    near: Tensor
    cross: Tensor
    difference: Tensor
    log_odds: Tensor
    """Far minus near log-mass, before the bias: p = sigmoid(log_odds + bias)."""

    def at(self, bias: float) -> Tensor:
        share = (self.log_odds + bias).sigmoid()
        return self.near + share * (2 * self.cross + share * self.difference)


def _calibrate_layer(
    mixer: LinearizedAttention, heads: Heads, target: Tensor, context: StepContext, teacher_window: int | None
) -> dict[str, Any]:
    assert mixer.far is not None
    chosen = {}
    if mixer.far.bank is not None:
        chosen = calibrate_bank(mixer, BankText(heads, target, context.rotary), teacher_window)
    return chosen | calibrate_state(mixer, heads, target, context)


def calibrate_state(mixer: LinearizedAttention, heads: Heads, target: Tensor, context: StepContext) -> dict[str, Any]:
    """Searches biases, and half-lives where the gate has one, of a layer that `is_calibrated`, sets the best, and says
    what they were. `target` is the teacher's attention output on the same sequences."""
    assert mixer.far is not None
    far, spec = mixer.far, mixer.spec
    ranges = list(_position_ranges(spec.near_tokens, heads.q.shape[1]))
    half_lives = HALF_LIVES if spec.gate in ("scalar", "fixed") else (None,)
    best_error = torch.full((mixer.num_kv_heads,), torch.inf)
    best_choice = torch.full((mixer.num_kv_heads,), len(half_lives) - 1)
    best_bias = torch.full((mixer.num_kv_heads, mixer.group), OFF)
    window_error = torch.zeros(mixer.num_kv_heads)
    near = mixer.attend_near(heads, context, None)
    written = mixer.tokens_for_state(heads, near, context)
    for choice, half_life in enumerate(half_lives) if ranges else ():
        if half_life is not None:
            far.gate_bias.fill_(gate_logit(half_life))
        read = mixer.read_state(heads.q, written, context, None)
        parts = _output_error(mixer, near.output, read, target)
        window_error = torch.stack([_sum_range(parts.near, part) for part in ranges]).sum(0).sum(-1)
        error, bias = _best_bias(parts, ranges)
        better = error.sum(-1) < best_error
        best_error = torch.where(better, error.sum(-1), best_error)
        best_choice = torch.where(better, choice, best_choice)
        best_bias = torch.where(better[:, None], bias, best_bias)
    far.bias.copy_(best_bias.flatten())
    return {
        "half_life": _set_half_lives(far, [half_lives[choice] for choice in best_choice.tolist()]),
        "bias": best_bias.flatten().tolist(),
        "error_of_window_only": _ratio(best_error.sum(), window_error.sum()),
    }


def _set_half_lives(far: FarFeatures, per_kv: list[float | None]) -> list[float] | None:
    """Gives each key-value head's states its half-life. None: the gate has none to set."""
    half_lives = [half_life for half_life in per_kv if half_life is not None]
    if not half_lives:
        return None
    logits = torch.tensor([gate_logit(half_life) for half_life in half_lives])
    far.gate_bias.copy_(logits.repeat_interleave(far.gate_bias.numel() // logits.numel()))
    return half_lives


def _ratio(error: Tensor, window_error: Tensor) -> float:
    """1 where the window alone makes no error: no far tokens, or an output projection of zeros."""
    return 1.0 if float(window_error) == 0.0 else float(error / window_error)


def _position_ranges(first: int, length: int) -> Iterator[tuple[int, int]]:
    """Doubling ranges of positions from the first that has far tokens."""
    low, high = first, 512
    while low < length:
        while high < low + first // 2:
            high *= 2
        yield low, min(high, length)
        low, high = high, high * 2


def _sum_range(error: Tensor, positions: tuple[int, int]) -> Tensor:
    """Sums [B, T, H_kv, G] over sequences and a range of positions."""
    return error[:, positions[0] : positions[1]].sum((0, 1))


def _best_bias(parts: _OutputError, ranges: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The least error and its bias [H_kv, G], among those not worse than the window alone in any range, and OFF."""
    window = torch.stack([_sum_range(parts.near, positions) for positions in ranges])
    best, chosen = window.sum(0), torch.full(window.shape[1:], OFF)
    for bias in BIASES:
        by_range = torch.stack([_sum_range(parts.at(bias), positions) for positions in ranges])
        better = (by_range <= window).all(0) & (by_range.sum(0) < best)
        best, chosen = torch.where(better, by_range.sum(0), best), torch.where(better, bias, chosen)
    return best, chosen


def _output_error(mixer: LinearizedAttention, near: NearOutput, far: Tensor, target: Tensor) -> _OutputError:
    """How far the layer is from the target after the output projection, as a function of the far part's share."""
    mass = far[..., -1].clamp_min(SMALLEST_MASS)
    gram = output_gram(mixer)
    off_near = near.values - target
    off_far = far[..., :-1] / mass[..., None] - near.values
    near_image = torch.einsum("bthgd,hgde->bthge", off_near, gram)
    far_image = torch.einsum("bthgd,hgde->bthge", off_far, gram)
    return _OutputError(
        (near_image * off_near).sum(-1),
        (near_image * off_far).sum(-1),
        (far_image * off_far).sum(-1),
        mass.log() - mixer.near_log_mass(near),
    )
