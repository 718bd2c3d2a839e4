"""The states of the delta rule (erase parallel to k, gates of one number per head) before every chunk of C tokens.

Inside blocks of B tokens the corrections u solve a unit triangular system (the WY form, arXiv 2406.06484), by
substitution: its condition grows with repeated keys, and powers of its matrix would lose what substitution keeps.
`row_chunk_outputs` then reads u as if it were v.
"""

import triton
import triton.language as tl

from unspool_kernels.triton.device.log_space import running_sums, sum_between
from unspool_kernels.triton.device.packing import first_block
from unspool_kernels.triton.device.row_chunk import load_log_decay, load_values


@triton.jit
def row_delta_states(
    k, k_token, k_head, v, v_token, v_head, log_decay, log_decay_token, log_decay_head, beta, beta_token,
    state, state_slot, slots, cu_seqlens, starts, corrections,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """u_i = beta_i (v_i - e^{b_i} S k_i - sum_{j<i} e^{D_ij} (k_i . k_j) u_j); S' = e^{b_B} S + U^T (K e^{D_B}), with
    D_ij = sum_{j<l<=i} g_l, b_i = sum_{l<=i} g_l. Writes u to corrections [N, H, R], S to starts [blocks, H, R, K]."""
    row_blocks: tl.constexpr = (R + BR - 1) // BR
    i_program = tl.program_id(0)
    i_row = i_program % row_blocks
    i_h = i_program // row_blocks % H
    i_s = i_program // (row_blocks * H)
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    o_k = tl.arange(0, BK)
    o_row = i_row * BR + tl.arange(0, BR)
    o_b = tl.arange(0, B)
    in_row = o_row < R
    last = o_b == B - 1
    o_state = i_h * (R * K) + o_row[:, None] * K + o_k[None, :]
    in_state = in_row[:, None] & (o_k < K)[None, :] & live

    b_state = tl.load(state + slot * state_slot + o_state, mask=in_state, other=0.0).to(tl.float32)
    block = first_block(start, i_s, C)
    for i_first in range(start, end, B):
        offset = i_first - start
        p_start = starts + (block + offset // C) * (H * R * K) + o_state
        tl.store(p_start, b_state, mask=in_state & (offset % C == 0))
        o_t = i_first + o_b
        in_t = o_t < end
        p_k = k + o_t[:, None] * k_token + i_h * k_head + o_k[None, :]
        b_k = tl.load(p_k, mask=in_t[:, None] & (o_k < K)[None, :], other=0.0).to(tl.float32)
        b_v = load_values(v + i_h * v_head, v_token, o_t, in_t, o_row, V, R)
        b_beta = tl.load(beta + o_t * beta_token + i_h, mask=in_t, other=0.0)
        b_log = load_log_decay(log_decay, log_decay_token, i_h * log_decay_head, o_t, in_t, B, GATE)
        b_coarse, b_fine, b_closed = running_sums(b_log)
        b_since = tl.exp(sum_between(b_coarse, b_fine, b_closed, 0.0, 0.0, 0))
        b_until = sum_between(  # [j, i]: from token j to token i
            b_coarse[None, :], b_fine[None, :], b_closed[None, :], b_coarse[:, None], b_fine[:, None], b_closed[:, None]
        )
        b_until = tl.where(o_b[:, None] <= o_b[None, :], tl.exp(b_until), 0.0)

        b_known = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_until * b_beta[None, :]
        b_u = b_v - tl.dot(b_k, tl.trans(b_state), input_precision=PRECISION) * b_since[:, None]
        b_u *= b_beta[:, None]
        for i_b in range(1, B):
            b_weight = tl.sum(tl.where((o_b == i_b)[None, :] & (o_b < i_b)[:, None], b_known, 0.0), 1)
            b_erased = tl.sum(b_weight[:, None] * b_u, 0)
            b_u -= tl.where((o_b == i_b)[:, None], b_erased[None, :], 0.0)
        p_u = corrections + (o_t[:, None] * H + i_h) * R + o_row[None, :]
        tl.store(p_u, b_u, mask=in_t[:, None] & in_row[None, :])

        b_written = b_k * tl.sum(tl.where(last[None, :], b_until, 0.0), 1)[:, None]
        b_state *= tl.sum(tl.where(last, b_since, 0.0), 0)
        b_state += tl.dot(tl.trans(b_u), b_written, input_precision=PRECISION)
    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    tl.store(state + slot * state_slot + o_state, b_state, mask=in_state & (end > start))
