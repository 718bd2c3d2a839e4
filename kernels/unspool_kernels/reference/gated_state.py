"""The gated matrix state, V-first: S_t = S_{t-1} diag(a_t) + v_t k_t^T, o_t = S_t q_t.

Covers linear attention, simple GLA, GLA and HGRN2 (arXiv 2312.06635, 2404.07904) by the shape of the decay alone.
A token with k = 0 and log-decay 0 leaves the state as it was: that is how callers mask padding.
"""

import torch
from torch import Tensor

SCALAR_BLOCK = 64
VECTOR_BLOCK = 16
"""Blocks with a decay per key feature hold [block, block, K] differences, so they are short."""


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token per sequence: q [B, H, G, K], k [B, H, K], v [B, H, V], log_decay [B, H, 1 or K], state [B, H, V, K].

    Returns o [B, H, G, V] and the new state. The old one is not written to.
    """
    decay = log_decay.double().exp().to(state.dtype)  # rounds alike at any place in a batch; see `merge`
    state = state * decay[:, :, None, :] + v[..., :, None] * k[..., None, :]
    return q @ state.transpose(-1, -2), state


def chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """T tokens per sequence: q [B, T, H, G, K], k [B, T, H, K], v [B, T, H, V], log_decay [B, T, H, 1 or K] <= 0.

    Equals T steps. Decays are differences of in-block cumulative log-decays, never quotients, so no exponent is
    positive. Returns o [B, T, H, G, V] and the state [B, H, V, K] after the last token.
    """
    block = SCALAR_BLOCK if log_decay.shape[-1] == 1 else VECTOR_BLOCK
    outputs = []
    for start in range(0, q.shape[1], block):
        part = slice(start, start + block)
        output, state = _block(q[:, part], k[:, part], v[:, part], log_decay[:, part], state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def _block(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = q.permute(0, 2, 3, 1, 4), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, (G,) C, .]
    since_start = log_decay.transpose(1, 2).cumsum(2)  # [B, H, C, 1 or K]
    between = pairwise_decay(since_start)  # [B, H, C, C, 1 or K]
    if between.shape[-1] == 1:
        scores = (q @ k[:, :, None].transpose(-1, -2)) * between[:, :, None, ..., 0]
    else:
        scores = torch.einsum("bhgik,bhijk->bhgij", q, between * k[:, :, None])
    carried = (q * since_start.exp()[:, :, None]) @ state[:, :, None].transpose(-1, -2)
    output = scores @ v[:, :, None] + carried  # [B, H, G, C, V]
    until_end = since_start[:, :, -1:]
    state = state * until_end.exp() + v.transpose(-1, -2) @ (k * (until_end - since_start).exp())
    return output.permute(0, 3, 1, 2, 4), state


def pairwise_decay(since_start: Tensor) -> Tensor:
    """exp(G_i - G_j) for j <= i and 0 above the diagonal: [..., C, X] cumulative log-decays to [..., C, C, X]."""
    length = since_start.shape[-2]
    causal = torch.ones(length, length, dtype=torch.bool, device=since_start.device).tril()[..., None]
    difference = since_start[..., :, None, :] - since_start[..., None, :, :]
    # Masked before the exponential: a difference above the diagonal may overflow, and inf * 0 has a NaN gradient.
    return difference.masked_fill(~causal, -torch.inf).exp()
