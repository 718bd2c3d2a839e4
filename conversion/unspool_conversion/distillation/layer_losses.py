"""How far one layer is from the teacher's attention: the error of its output, and of what its state says alone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool.batch import StepContext
from unspool.mixer import SMALLEST_MASS, Heads, LinearizedAttention
from unspool_conversion.distillation.student import without_adapter


@dataclass(frozen=True)
class LayerLoss:
    """What a layer is measured by. Positions before `first` do not count: there it is the teacher's."""

    mixer: LinearizedAttention
    first: int
    teacher_window: int | None
    state_weight: float
    variance: float
    """Of the teacher's output at the positions that count; errors are relative to it."""

    def scaled_by(self, targets: Tensor) -> "LayerLoss":
        """The same for text on which the teacher's attention gives targets [N, T, hidden]."""
        return replace(self, variance=max(float(targets[:, self.first :].var()), 1e-12))

    @property
    def has_state_term(self) -> bool:
        """Only a disjoint state has a target of its own: the teacher's attention to what the state holds."""
        return self.state_weight > 0 and self.mixer.spec.join == "disjoint"


def output_error(loss: LayerLoss, x: Tensor, target: Tensor, context: StepContext) -> Tensor:
    """Mean squared error of the layer's output for normed inputs x [B, T, hidden], relative to the variance."""
    mixer = loss.mixer
    return _relative_error(loss, mixer.project_out(mixer.mix(mixer.project(x), context), x.dtype), target)


def training_loss(loss: LayerLoss, x: Tensor, target: Tensor, context: StepContext) -> tuple[Tensor, float, float]:
    """The loss to minimise, and its two parts: the output's relative error and the state's."""
    if not loss.has_state_term:
        error = output_error(loss, x, target, context)
        return error, error.item(), 0.0
    mixer = loss.mixer
    heads = mixer.project(x)
    near, far = mixer.attend_both(heads, context)
    error = _relative_error(loss, mixer.project_out(mixer.join_disjoint(near, far, context), x.dtype), target)
    with torch.no_grad(), without_adapter(mixer):
        state_target = attend_to_far(mixer.project(x), find_left(mixer, heads, context), context, loss)
    read_out = (far[..., :-1] / far[..., -1:].clamp_min(SMALLEST_MASS))[:, loss.first :]
    state_error = F.mse_loss(read_out, state_target) / state_target.var().clamp_min(1e-12)
    return error + loss.state_weight * state_error, error.item(), state_error.item()


def attend_to_far(heads: Heads, left_at: Tensor, context: StepContext, loss: LayerLoss) -> Tensor:
    """The teacher's attention [B, T - first, H_kv, G, D] to the tokens that the state holds, as if they were all.

    `left_at` is what `find_left` gave. Tokens beyond the teacher's own window count only where it saw no other.
    """
    length, group = heads.q.shape[1], heads.q.shape[3]
    q, k = context.query.apply(heads.q), context.query.apply(heads.k)
    position = torch.arange(length, device=q.device)
    query = position[loss.first :, None]
    visible = left_at[:, :, None] <= query  # [B or 1, H_kv or 1, T - first, T]
    if loss.teacher_window is not None:
        seen = visible & (position > query - loss.teacher_window)
        visible = torch.where(seen.any(-1, keepdim=True), seen, visible)
    keys, values = (part.transpose(1, 2).repeat_interleave(group, dim=1) for part in (k, heads.v))
    queries = q[:, loss.first :].flatten(2, 3).transpose(1, 2)
    visible = visible.repeat_interleave(group, dim=1) if visible.shape[1] > 1 else visible
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
    return output.transpose(1, 2).reshape(q.shape[0], length - loss.first, *q.shape[2:])


@torch.no_grad()
def find_left(mixer: LinearizedAttention, heads: Heads, context: StepContext) -> Tensor:
    """The position at which each token goes to a disjoint state [B, H_kv, T], or [1, 1, T] where all heads agree; T for
    a token that never does."""
    spec, length = mixer.spec, heads.q.shape[1]
    position = torch.arange(length, device=heads.q.device)
    if not spec.bank:
        return torch.where(position < spec.sinks, length, position + spec.window)[None, None]
    part = mixer.attend_near(heads, context, None)
    left_at = position.new_full((*heads.k.shape[:1], heads.k.shape[2], length + 1), length)
    # What is junk goes to one more place, which is cut off.
    token = torch.where(part.left[..., None], part.left_positions.long(), length).transpose(1, 2)
    return left_at.scatter_(2, token, position.expand_as(token))[..., :length]


def _relative_error(loss: LayerLoss, output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output[:, loss.first :], target[:, loss.first :]) / loss.variance
