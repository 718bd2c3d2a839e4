"""Aaren's softmax with a fixed query: state (m, u, w) per head. A program owns one head of one sequence, all channels,
since every channel needs m and u. p_: pointer; b_: block in registers, float32; o_: offsets; i_: index."""

import triton
import triton.language as tl

from unspool_kernels.triton.device.log_space import larger, shift_of


@triton.jit
def softmax_scan_chunk(
    scores, scores_token, v, v_token, v_head, state, state_slot, slots, cu_seqlens, o, log_mass,
    H: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """m_i = max(m_0, s_j<=i), P_ij = e^(s_j - m_i) for j <= i; u = P 1 + e^(m_0 - m) u_0, w = P V + e^(m_0 - m) w_0."""
    i_h = tl.program_id(0) % H
    i_s = tl.program_id(0) // H
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    o_v = tl.arange(0, BV)
    o_c = tl.arange(0, C)
    in_v = o_v < V
    last = o_c == C - 1
    p_state = state + slot * state_slot + i_h * (V + 2)
    b_max = tl.load(p_state, mask=live, other=0.0).to(tl.float32)
    b_mass = tl.load(p_state + 1, mask=live, other=0.0).to(tl.float32)
    b_sum = tl.load(p_state + 2 + o_v, mask=in_v & live, other=0.0).to(tl.float32)

    for i_first in range(start, end, C):
        o_t = i_first + o_c
        in_t = o_t < end
        in_tv = in_t[:, None] & in_v[None, :]
        b_score = tl.load(scores + o_t * scores_token + i_h, mask=in_t, other=float("-inf"))
        b_v = tl.load(v + o_t[:, None] * v_token + i_h * v_head + o_v[None, :], mask=in_tv, other=0.0).to(tl.float32)
        b_m = tl.maximum(tl.associative_scan(b_score, 0, larger), b_max)
        shift = shift_of(b_m)
        b_weight = tl.exp(b_score[None, :] - shift[:, None])
        b_weight = tl.where(o_c[:, None] >= o_c[None, :], b_weight, 0.0)
        b_carried = tl.exp(b_max - shift)
        b_u = tl.sum(b_weight, 1) + b_carried * b_mass
        b_w = tl.dot(b_weight, b_v, b_carried[:, None] * b_sum[None, :], input_precision=PRECISION)
        b_o = tl.where((b_u == 0.0)[:, None], 0.0, b_w / b_u[:, None])
        p_o = o + (o_t[:, None] * H + i_h) * V + o_v[None, :]
        tl.store(p_o, tl.where(live, b_o, 0.0), mask=in_tv)
        tl.store(log_mass + o_t * H + i_h, tl.where(live, b_m + tl.log(b_u), 0.0), mask=in_t)
        b_max = tl.sum(tl.where(last, b_m, 0.0), 0)
        b_mass = tl.sum(tl.where(last, b_u, 0.0), 0)
        b_sum = tl.sum(tl.where(last[:, None], b_w, 0.0), 0)

    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    written = live & (end > start)
    tl.store(p_state, b_max, mask=written)
    tl.store(p_state + 1, b_mass, mask=written)
    tl.store(p_state + 2 + o_v, b_sum, mask=in_v & written)


@triton.jit
def softmax_scan_recurrent(
    scores, scores_token, v, v_token, v_head, state, state_slot, slots, cu_seqlens, o, log_mass,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """m' = max(m, s); u' = e^(m - m') u + e^(s - m'); w' = e^(m - m') w + e^(s - m') v; o = w' / u'."""
    i_h = tl.program_id(0) % H
    i_s = tl.program_id(0) // H
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    o_v = tl.arange(0, BV)
    in_v = o_v < V
    p_state = state + slot * state_slot + i_h * (V + 2)
    b_max = tl.load(p_state, mask=live, other=0.0).to(tl.float32)
    b_mass = tl.load(p_state + 1, mask=live, other=0.0).to(tl.float32)
    b_sum = tl.load(p_state + 2 + o_v, mask=in_v & live, other=0.0).to(tl.float32)

    for i_t in range(start, end):
        b_score = tl.load(scores + i_t * scores_token + i_h)
        b_v = tl.load(v + i_t * v_token + i_h * v_head + o_v, mask=in_v, other=0.0).to(tl.float32)
        b_m = tl.maximum(b_max, b_score)
        shift = shift_of(b_m)
        b_carried, b_weight = tl.exp(b_max - shift), tl.exp(b_score - shift)
        b_mass = b_carried * b_mass + b_weight
        b_sum = b_carried * b_sum + b_weight * b_v
        b_max = b_m
        b_o = tl.where(b_mass == 0.0, 0.0, b_sum / b_mass)
        tl.store(o + (i_t * H + i_h) * V + o_v, tl.where(live, b_o, 0.0), mask=in_v)
        tl.store(log_mass + i_t * H + i_h, tl.where(live, b_max + tl.log(b_mass), 0.0))

    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    written = live & (end > start)
    tl.store(p_state, b_max, mask=written)
    tl.store(p_state + 1, b_mass, mask=written)
    tl.store(p_state + 2 + o_v, b_sum, mask=in_v & written)
