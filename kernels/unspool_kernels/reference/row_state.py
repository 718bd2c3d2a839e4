"""The row kernel in blocks of tokens: S_t = S_{t-1} (diag(a_t) + p_t b_t^T) + v_t k_t^T, o_t = S_t q_t or S_{t-1} q_t.

Inside a block every decay is the exponential of a sum of log-decays, never a quotient, so that closed gates (-inf) are
exact and nothing overflows; the erase is one triangular solve (the WY form). `ops.row_state` has the shapes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unspool_kernels.contract import Result, RowKernel
from unspool_kernels.reference.packing import Group, map_groups, widen

SCALAR_BLOCK = 64
VECTOR_BLOCK = 16
"""Blocks with a decay per feature hold [block, block, K] sums, so they are short."""


class Tokens(NamedTuple):
    """The tokens of a group, heads first: q [L, H, G, T, K]; k, p and b [L, H, T, K]; v and written [L, H, T, R];
    log_decay [L, H, T, 1, K or V]; log_input [L, H, T, 1]. `written` is the v that enters the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    written: Tensor
    log_decay: Tensor
    p: Tensor | None
    b: Tensor | None
    log_input: Tensor | None

    def block(self, start: int, size: int) -> "Tokens":
        part = slice(start, start + size)
        p, b, log_input = (None if x is None else x[..., part, :] for x in (self.p, self.b, self.log_input))
        q, k, v, written, log_decay = (x[..., part, :] for x in self[:5])
        return Tokens(q, k, v, written, log_decay, p, b, log_input)


class Decays(NamedTuple):
    """Of one block of C tokens: pairs [..., C, C, X], the decay from after token j to the state that token i reads
    (0 where i does not read j), and start [..., C, X], the same from the block's start."""

    pairs: Tensor
    start: Tensor

    def before(self) -> "Decays":
        """As read before each token's own decay and write."""
        return Decays(
            F.pad(self.pairs[..., :-1, :, :], (0, 0, 0, 0, 1, 0)),
            F.pad(self.start[..., :-1, :], (0, 0, 1, 0), value=1.0),
        )


def row_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: RowKernel,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    log_decay: Tensor | None = None,
    erase_read: Tensor | None = None,
    erase_write: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    log_input: Tensor | None = None,
    max_state: Tensor | None = None,
) -> Result:
    """((o,), (state,)), or ((o, m), (state, max_state)) with a stabilizer."""
    if log_decay is None:
        log_decay = widen(k).new_zeros(k.shape[1])

    def form(group: Group, rows: tuple[Tensor, ...]) -> Result:
        tokens = _gather(group, kernel, (q, k, v), log_decay, (erase_read, erase_write), beta, log_input)
        size = SCALAR_BLOCK if tokens.log_decay.shape[-1] == 1 else VECTOR_BLOCK
        carried = tuple(widen(row) for row in rows)
        outputs = []
        for start in range(0, group.tokens.shape[1], size):
            block = tokens.block(start, size)
            if kernel.stabilizer:
                output, carried = _stabilized_block(block, carried)
            elif kernel.gate == "value":
                output, carried = _value_block(block, carried, kernel)
            else:
                output, carried = _block(block, carried, kernel)
            outputs.append(output)
        o, *m = (torch.cat(parts, dim=-2) for parts in zip(*outputs, strict=True))
        if bonus is not None:
            weights = (tokens.q * (bonus[:, None] * tokens.k)[:, :, None]).sum(-1, keepdim=True)
            o = o + weights * tokens.v[:, :, None]
        return (o.permute(0, 3, 1, 2, 4).to(q.dtype), *(x[..., 0].transpose(1, 2) for x in m)), carried

    states = (state,) if max_state is None else (state, max_state)
    return map_groups(form, states, slots, cu_seqlens)


def _gather(
    group: Group,
    kernel: RowKernel,
    qkv: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor,
    erase: tuple[Tensor | None, Tensor | None],
    beta: Tensor | None,
    log_input: Tensor | None,
) -> Tokens:
    def heads_first(x: Tensor) -> Tensor:
        return widen(x[group.tokens]).movedim(1, -2)  # [L, H, ..., T, X]

    q, k, v = map(heads_first, qkv)
    if kernel.normalizer:
        v = F.pad(v, (0, 1), value=1.0)
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(qkv[1].shape[:2])
    log_decay = heads_first(log_decay if log_decay.dim() == 3 else log_decay[..., None])
    p, b = (None if x is None else heads_first(x) for x in erase)
    written = v
    if beta is not None:
        strength = heads_first(beta[..., None])
        p, b, written = log_decay.exp() * k, -strength * k, strength * v
    return Tokens(q, k, v, written, log_decay, p, b, None if log_input is None else heads_first(log_input[..., None]))


def _block(tokens: Tokens, carried: tuple[Tensor, ...], kernel: RowKernel) -> Result:
    (state,) = carried
    decays = _decays(tokens.log_decay)
    read = decays if kernel.read == "after" else decays.before()
    written = tokens.written
    q, k, reads = tokens.q, tokens.k, Decays(read.pairs[:, :, None], read.start[:, :, None])
    output = _scores(q, k[:, :, None], reads.pairs) @ written[:, :, None]
    output = output + (q * reads.start) @ state[:, :, None].transpose(-1, -2)
    until_end = decays.pairs[..., -1, :, :]
    end = state * decays.start[..., -1:, :] + written.transpose(-1, -2) @ (k * until_end)
    if tokens.p is not None and tokens.b is not None:
        erased = _erased(tokens.p, tokens.b, tokens, decays.before(), state)
        output = output + _scores(q, tokens.b[:, :, None], reads.pairs) @ erased[:, :, None]
        end = end + erased.transpose(-1, -2) @ (tokens.b * until_end)
    return (output,), (end,)


def _erased(p: Tensor, b: Tensor, tokens: Tokens, before: Decays, state: Tensor) -> Tensor:
    """S_{t-1} p_t for every token [L, H, C, R]: each depends on those before it through their own erases."""
    known = (p * before.start) @ state.transpose(-1, -2) + _scores(p, tokens.k, before.pairs) @ tokens.written
    among = torch.eye(p.shape[-2], dtype=p.dtype, device=p.device) - _scores(p, b, before.pairs)
    erased: Tensor = torch.linalg.solve_triangular(among, known, upper=False, unitriangular=True)
    return erased


def _value_block(tokens: Tokens, carried: tuple[Tensor, ...], kernel: RowKernel) -> Result:
    (state,) = carried
    decays = _decays(tokens.log_decay)
    read = decays if kernel.read == "after" else decays.before()
    scores = tokens.q @ tokens.k[:, :, None].transpose(-1, -2)
    output = torch.einsum("bhgij,bhijv->bhgiv", scores, read.pairs * tokens.v[..., None, :, :])
    output = output + read.start[:, :, None] * (tokens.q @ state[:, :, None].transpose(-1, -2))
    written = tokens.v * decays.pairs[..., -1, :, :]
    end = state * decays.start[..., -1, :, None] + written.transpose(-1, -2) @ tokens.k
    return (output,), (end,)


def _stabilized_block(tokens: Tokens, carried: tuple[Tensor, ...]) -> Result:
    state, m = carried  # [L, H, R, K], [L, H]
    assert tokens.log_input is not None
    log_pairs = _segment_sums(tokens.log_decay)[..., 0] + tokens.log_input.transpose(-1, -2)  # [L, H, C, C]
    log_start = tokens.log_decay[..., 0].cumsum(-1) + m[..., None]  # [L, H, C]
    maximum = torch.maximum(log_pairs.amax(-1), log_start)
    shift = maximum.masked_fill(maximum == -torch.inf, 0.0)  # nothing came in yet: -inf minus -inf would be NaN
    pairs, start = (log_pairs - shift[..., None]).exp(), (log_start - shift).exp()
    scores = (tokens.q @ tokens.k[:, :, None].transpose(-1, -2)) * pairs[:, :, None]
    output = scores @ tokens.v[:, :, None] + (tokens.q * start[:, :, None, :, None]) @ state[:, :, None].transpose(
        -1, -2
    )
    end = state * start[..., -1, None, None] + tokens.v.transpose(-1, -2) @ (tokens.k * pairs[..., -1, :, None])
    return (output, maximum[..., None]), (end, maximum[..., -1])


def _scores(x: Tensor, y: Tensor, pairs: Tensor) -> Tensor:
    """x_i . (y_j pairs_ij): x and y [..., C, K], pairs [..., C, C, 1 or K] to [..., C, C]."""
    if pairs.shape[-1] == 1:
        return (x @ y.transpose(-1, -2)) * pairs[..., 0]
    return torch.einsum("...ik,...ijk->...ij", x, pairs * y[..., None, :, :])


def _decays(log_decay: Tensor) -> Decays:
    return Decays(_segment_sums(log_decay).exp(), log_decay.cumsum(-2).exp())


def _segment_sums(log_decay: Tensor) -> Tensor:
    """Sum of the log-decays of tokens j + 1 .. i, -inf for j > i: [..., C, X] to [..., C, C, X].

    Summed over a mask, not as a difference of two sums: closed gates would make that -inf minus -inf.
    """
    length = log_decay.shape[-2]
    later = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril(-1)[..., None]
    sums = torch.where(later, log_decay[..., :, None, :], 0.0).cumsum(-3)
    return sums.masked_fill(later.transpose(0, 1), -torch.inf)
