"""How far a student's predictions are from its teacher's and from the text: a few positions' vocabulary at a time."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_POSITIONS_AT_ONCE = 256


class PredictionLoss(NamedTuple):
    """Sums over positions, in nats: KL(teacher || student) and next-token cross-entropy. Scalars."""

    divergence: Tensor
    cross_entropy: Tensor

    def mixed(self, cross_entropy: float) -> Tensor:
        """The two at that share of cross-entropy."""
        return (1 - cross_entropy) * self.divergence + cross_entropy * self.cross_entropy


def prediction_loss(
    head: nn.Module, hidden: Tensor, teacher_logits: Tensor | None, next_tokens: Tensor, *, confidence: bool
) -> PredictionLoss:
    """Of hidden vectors [P, hidden], against the teacher's logits [P, V] and the tokens that follow [P].

    `confidence` weighs each position's divergence by the teacher's largest probability. Without a teacher there is no
    divergence. Logits are computed again for the gradient, so that few are held.
    """
    starts = range(0, hidden.shape[0], _POSITIONS_AT_ONCE)
    sums = hidden.new_zeros(2)
    for start in starts:
        part = slice(start, start + _POSITIONS_AT_ONCE)
        teacher = teacher_logits[part] if teacher_logits is not None else None
        sums = sums + checkpoint(
            _block_loss, head, hidden[part], teacher, next_tokens[part], confidence, use_reentrant=False
        )
    return PredictionLoss(sums[0], sums[1])


def _block_loss(
    head: nn.Module, hidden: Tensor, teacher_logits: Tensor | None, next_tokens: Tensor, confidence: bool
) -> Tensor:
    log_student = head(hidden).float().log_softmax(-1)
    cross_entropy = F.nll_loss(log_student, next_tokens, reduction="sum")
    if teacher_logits is None:
        return torch.stack([torch.zeros_like(cross_entropy), cross_entropy])
    log_teacher = teacher_logits.float().log_softmax(-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    if confidence:
        divergence = divergence * log_teacher.amax(-1).exp()
    return torch.stack([divergence.sum(), cross_entropy])
