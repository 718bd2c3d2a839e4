"""From a mixer's projections to the coefficients of `diagonal_scan`: h_t = decay_t h_{t-1} + x_t."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Coefficients(NamedTuple):
    """decay and x as `ops.diagonal_scan` takes them."""

    decay: Tensor
    x: Tensor


def rg_lru(x: Tensor, recurrence_gate: Tensor, input_gate: Tensor, a_param: Tensor, first: Tensor) -> Coefficients:
    """Griffin's RG-LRU (arXiv 2402.19427): x and both gates before their sigmoid [N, C], a_param [C], first [N] (bool).

    log a = -8 sigmoid(recurrence_gate) softplus(a_param), x sqrt(1 - a^2) sigmoid(input_gate). The first token of a
    text has no history to make room for: a = 0 and a multiplier of 1.
    """
    log_decay = -8.0 * recurrence_gate.sigmoid() * F.softplus(a_param)
    # 1 - a^2 without cancellation: a is near 1 where the gate remembers longest.
    room = torch.where(first[:, None], 1.0, (-torch.expm1(2.0 * log_decay)).sqrt())
    decay = torch.where(first[:, None], 0.0, log_decay.exp())
    return Coefficients(decay, room * input_gate.sigmoid() * x)


def s6(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, negative_eigenvalues: bool = False) -> Coefficients:
    """Mamba's selective discretisation: x and dt before its softplus [N, C], a [C, M] (below 0), b [N, M] to [N, C, M].

    softplus is the identity above 20, as in the published kernels. negative_eigenvalues maps the decay to (-1, 1).
    """
    dt = F.softplus(dt, threshold=20.0)
    decay = (dt[..., None] * a).exp()
    return Coefficients(2.0 * decay - 1.0 if negative_eigenvalues else decay, (dt * x)[..., None] * b[:, None])


def s4d(x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> Coefficients:
    """S4D's zero-order hold: x [N, C], dt [C], a (real part below 0) and b [C, M, 2] as complex pairs.

    decay = e^{dt a} [C, M, 2] is constant, x = b (e^{dt a} - 1) / a x [N, C, M, 2].
    """
    pole = torch.view_as_complex(a)
    held = torch.view_as_complex(b) * torch.expm1(dt[:, None] * pole) / pole
    return Coefficients(torch.view_as_real((dt[:, None] * pole).exp()), torch.view_as_real(held) * x[..., None, None])
