"""Gated slot attention (arXiv 2409.07146): M key slots and M value slots, both decayed per slot, a softmax between.

keys_t = diag(a_t) keys_{t-1} + (1 - a_t) k_t^T, values likewise, o_t = values_t^T softmax(scale keys_t q_t).
A token with log-decay 0 writes nothing, which is how callers mask padding.
"""

import torch
from torch import Tensor

from unspool_kernels.reference.gated_state import VECTOR_BLOCK, pairwise_decay


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per sequence: q [B, H, G, K], k [B, H, K], v [B, H, V], log_decay [B, H, M], keys [B, H, M, K],
    values [B, H, M, V]. Returns o [B, H, G, V] and the new keys and values."""
    write = -torch.expm1(log_decay)[..., None]
    keep = log_decay.exp()[..., None]
    keys = keys * keep + write * k[..., None, :]
    values = values * keep + write * v[..., None, :]
    weights = (scale * (q @ keys.transpose(-1, -2))).softmax(-1)
    return weights @ values, keys, values


def chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """T tokens per sequence: q [B, T, H, G, K], k [B, T, H, K], v [B, T, H, V], log_decay [B, T, H, M] <= 0.

    Equals T steps. Returns o [B, T, H, G, V] and the keys and values after the last token.
    """
    outputs = []
    for start in range(0, q.shape[1], VECTOR_BLOCK):
        part = slice(start, start + VECTOR_BLOCK)
        output, keys, values = _block(q[:, part], k[:, part], v[:, part], log_decay[:, part], keys, values, scale)
        outputs.append(output)
    return torch.cat(outputs, dim=1), keys, values


def _block(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = q.permute(0, 2, 3, 1, 4), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, (G,) C, .]
    log_decay = log_decay.transpose(1, 2)
    since_start = log_decay.cumsum(2)  # [B, H, C, M]
    write = -torch.expm1(log_decay)
    between = pairwise_decay(since_start) * write[:, :, None]  # [B, H, i, j, M]
    carry = since_start.exp()[:, :, None]
    matches = q @ k[:, :, None].transpose(-1, -2)  # [B, H, G, i, j]
    scores = torch.einsum("bhgij,bhijm->bhgim", matches, between) + carry * (q @ keys[:, :, None].transpose(-1, -2))
    weights = (scale * scores).softmax(-1)
    output = torch.einsum("bhgim,bhijm,bhjv->bhgiv", weights, between, v) + (weights * carry) @ values[:, :, None]
    until_end = since_start[:, :, -1:]
    written = ((until_end - since_start).exp() * write).transpose(-1, -2)  # [B, H, M, C]
    keep = until_end.exp().transpose(-1, -2)
    return output.permute(0, 3, 1, 2, 4), keys * keep + written @ k, values * keep + written @ v
