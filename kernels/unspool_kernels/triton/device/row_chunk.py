"""The row kernel in chunks of C tokens, by dot products: gates of one number per head, and mLSTM's.

Two passes: the state at the start of every chunk, one sequence after another token (here, or with the delta rule's
erase in `row_delta`), then all outputs at once. Names as in `row_recurrent`.
"""

import triton
import triton.language as tl

from unspool_kernels.triton.device.log_space import running_sums, shift_of, sum_between
from unspool_kernels.triton.device.packing import first_block, sequence_of_block


@triton.jit
def load_log_decay(log_decay, token_stride, o_head, o_t, in_t, C: tl.constexpr, GATE: tl.constexpr):
    """[C] log-decays of the head at o_head, 0 beyond the end."""
    if GATE == "none":
        b_log = tl.zeros([C], tl.float32)
    else:
        b_log = tl.load(log_decay + o_t * token_stride + o_head, mask=in_t, other=0.0)
    return b_log


@triton.jit
def load_values(v, v_token, o_t, in_t, o_row, V: tl.constexpr, R: tl.constexpr):
    """[C, BR] values in float32, with 1 in the normalizer's row; v points at the head's."""
    p_v = v + o_t[:, None] * v_token + o_row[None, :]
    b_v = tl.load(p_v, mask=in_t[:, None] & (o_row < V)[None, :], other=0.0).to(tl.float32)
    if R > V:
        b_v = tl.where((o_row == V)[None, :], 1.0, b_v)
    return b_v


@triton.jit
def row_chunk_states(
    k, k_token, k_head, v, v_token, v_head, log_decay, log_decay_token, log_decay_head, log_input, log_input_token,
    state, state_slot, max_state, max_state_slot, slots, cu_seqlens, starts, start_maxima,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, STABILIZER: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """S' = S e^(b_C + m - m') + V^T (K e^(D_C - m')): D_Cj = sum_{j<l<=C} f_l + i_j, b_C = sum f; without a stabilizer
    i = m = 0. Writes S to starts [blocks, H, R, K] and m to start_maxima [blocks, H] before each chunk."""
    row_blocks: tl.constexpr = (R + BR - 1) // BR
    key_blocks: tl.constexpr = (K + BK - 1) // BK
    i_program = tl.program_id(0)
    i_k = i_program % key_blocks
    i_row = i_program // key_blocks % row_blocks
    i_h = i_program // (key_blocks * row_blocks) % H
    i_s = i_program // (key_blocks * row_blocks * H)
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    o_k = i_k * BK + tl.arange(0, BK)
    o_row = i_row * BR + tl.arange(0, BR)
    o_c = tl.arange(0, C)
    last = o_c == C - 1
    o_state = i_h * (R * K) + o_row[:, None] * K + o_k[None, :]
    in_state = (o_row < R)[:, None] & (o_k < K)[None, :] & live

    b_state = tl.load(state + slot * state_slot + o_state, mask=in_state, other=0.0).to(tl.float32)
    if STABILIZER:
        b_max = tl.load(max_state + slot * max_state_slot + i_h, mask=live, other=0.0)
    i_block = first_block(start, i_s, C)
    for i_first in range(start, end, C):
        tl.store(starts + i_block * (H * R * K) + o_state, b_state, mask=in_state)
        o_t = i_first + o_c
        in_t = o_t < end
        p_k = k + o_t[:, None] * k_token + i_h * k_head + o_k[None, :]
        b_k = tl.load(p_k, mask=in_t[:, None] & (o_k < K)[None, :], other=0.0).to(tl.float32)
        b_v = load_values(v + i_h * v_head, v_token, o_t, in_t, o_row, V, R)
        b_log = load_log_decay(log_decay, log_decay_token, i_h * log_decay_head, o_t, in_t, C, GATE)
        b_coarse, b_fine, b_closed = running_sums(b_log)
        coarse = tl.sum(tl.where(last, b_coarse, 0.0), 0)
        fine = tl.sum(tl.where(last, b_fine, 0.0), 0)
        closed = tl.sum(tl.where(last, b_closed, 0), 0)
        b_until_end = sum_between(coarse, fine, closed, b_coarse, b_fine, b_closed)
        through = sum_between(coarse, fine, closed, 0.0, 0.0, 0)
        if STABILIZER:
            tl.store(start_maxima + i_block * H + i_h, b_max, mask=live & (i_k == 0) & (i_row == 0))
            b_until_end += tl.load(log_input + o_t * log_input_token + i_h, mask=in_t, other=float("-inf"))
            through += b_max
            b_max = tl.maximum(tl.max(b_until_end, 0), through)
            shift = shift_of(b_max)
            b_until_end -= shift
            through -= shift
        b_written = b_k * tl.exp(b_until_end)[:, None]
        b_state = b_state * tl.exp(through) + tl.dot(tl.trans(b_v), b_written, input_precision=PRECISION)
        i_block += 1
    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    tl.store(state + slot * state_slot + o_state, b_state, mask=in_state & (end > start))


@triton.jit(do_not_specialize=["S", "steps"])
def row_chunk_outputs(
    q, q_token, q_head, q_group, k, k_token, k_head, v, v_token, v_head,
    log_decay, log_decay_token, log_decay_head, log_input, log_input_token,
    slots, cu_seqlens, starts, start_maxima, o, m, S, steps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, STABILIZER: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """O = (Q K^T * e^(D - m_i)) V + e^(b + m_0 - m_i) Q S^T, D_ij = sum_{j<l<=i} f_l + i_j, b_i = sum_{l<=i} f_l."""
    row_blocks: tl.constexpr = (R + BR - 1) // BR
    i_program = tl.program_id(0)
    i_row = i_program % row_blocks
    i_g = i_program // row_blocks % G
    i_h = i_program // (row_blocks * G) % H
    i_block = i_program // (row_blocks * G * H)
    i_s = sequence_of_block(cu_seqlens, i_block, steps, S, C)
    live = tl.load(slots + i_s) >= 0
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    i_first = start + (i_block - first_block(start, i_s, C)) * C
    if i_first >= end:
        return
    o_row = i_row * BR + tl.arange(0, BR)
    o_c = tl.arange(0, C)
    o_t = i_first + o_c
    in_t = o_t < end

    b_score = tl.zeros([C, C], tl.float32)
    b_o = tl.zeros([C, BR], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        in_tk = in_t[:, None] & (o_k < K)[None, :]
        p_q = q + o_t[:, None] * q_token + i_h * q_head + i_g * q_group + o_k[None, :]
        p_k = k + o_t[:, None] * k_token + i_h * k_head + o_k[None, :]
        p_state = starts + (i_block * H + i_h).to(tl.int64) * (R * K) + o_row[None, :] * K + o_k[:, None]
        b_q = tl.load(p_q, mask=in_tk, other=0.0).to(tl.float32)
        b_k = tl.load(p_k, mask=in_tk, other=0.0).to(tl.float32)
        b_state = tl.load(p_state, mask=(o_row < R)[None, :] & (o_k < K)[:, None], other=0.0)
        b_score = tl.dot(b_q, tl.trans(b_k), b_score, input_precision=PRECISION)
        b_o = tl.dot(b_q, b_state, b_o, input_precision=PRECISION)

    b_log = load_log_decay(log_decay, log_decay_token, i_h * log_decay_head, o_t, in_t, C, GATE)
    b_coarse, b_fine, b_closed = running_sums(b_log)
    b_weight = sum_between(
        b_coarse[:, None], b_fine[:, None], b_closed[:, None], b_coarse[None, :], b_fine[None, :], b_closed[None, :]
    )
    b_since = sum_between(b_coarse, b_fine, b_closed, 0.0, 0.0, 0)
    causal = o_c[:, None] >= o_c[None, :]
    if STABILIZER:
        b_weight += tl.load(log_input + o_t * log_input_token + i_h, mask=in_t, other=float("-inf"))[None, :]
        b_since += tl.load(start_maxima + i_block * H + i_h)
        b_max = tl.maximum(tl.max(tl.where(causal, b_weight, float("-inf")), 1), b_since)
        tl.store(m + o_t * H + i_h, tl.where(live, b_max, 0.0), mask=in_t & (i_g == 0) & (i_row == 0))
        shift = shift_of(b_max)
        b_weight -= shift[:, None]
        b_since -= shift
    b_score *= tl.where(causal, tl.exp(b_weight), 0.0)
    b_v = load_values(v + i_h * v_head, v_token, o_t, in_t, o_row, V, R)
    b_o = tl.dot(b_score, b_v, b_o * tl.exp(b_since)[:, None], input_precision=PRECISION)
    p_o = o + ((o_t[:, None] * H + i_h) * G + i_g) * R + o_row[None, :]
    tl.store(p_o, tl.where(live, b_o, 0.0), mask=in_t[:, None] & (o_row < R)[None, :])
