"""Softmax attention over the first M tokens (sinks) and the last W (a ring), whose rows live in one buffer per head.

Row of position p: p while p < M, else M + (p - M) mod W. Keys and values of the call itself are read as the buffer
would store them. p_: pointer; b_: block in registers, float32; o_: offsets; i_: index.
"""

import triton
import triton.language as tl

from unspool_kernels.triton.device.log_space import shift_of
from unspool_kernels.triton.device.packing import first_block, sequence_of_block


@triton.jit
def row_of(position, M: tl.constexpr, W: tl.constexpr):
    return tl.where(position < M, position, M + (position - M) % W)


@triton.jit
def ring_attention_step(
    q, q_token, q_head, q_group, sink_q, sink_q_token, sink_q_head, sink_q_group,
    k, k_token, k_head, v, v_token, v_head, keys, keys_slot, values, values_slot,
    positions, slots, cu_seqlens, o, log_mass, row_max, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Token by token: writes its row, then reads all rows that are filled. A program owns one head of one sequence."""
    i_h = tl.program_id(0) % H
    i_s = tl.program_id(0) // H
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    first = tl.load(positions + i_s).to(tl.int64)
    live = slot >= 0
    o_g = tl.arange(0, BG)
    o_d = tl.arange(0, BD)
    in_d = o_d < D
    in_gd = (o_g < G)[:, None] & in_d[None, :]
    p_keys = keys + slot * keys_slot + i_h * ((M + W) * D)
    p_values = values + slot * values_slot + i_h * ((M + W) * D)

    for i_t in range(start, end):
        position = first + i_t - start
        o_row = row_of(position, M, W) * D + o_d
        b_k = tl.load(k + i_t * k_token + i_h * k_head + o_d, mask=in_d, other=0.0)
        b_v = tl.load(v + i_t * v_token + i_h * v_head + o_d, mask=in_d, other=0.0)
        tl.debug_barrier()  # other threads may still read the row that goes
        tl.store(p_keys + o_row, b_k, mask=in_d & live)
        tl.store(p_values + o_row, b_v, mask=in_d & live)
        tl.debug_barrier()

        o_q = o_g[:, None] * q_group + o_d[None, :]
        o_sink_q = o_g[:, None] * sink_q_group + o_d[None, :]
        b_q = tl.load(q + i_t * q_token + i_h * q_head + o_q, mask=in_gd, other=0.0).to(tl.float32)
        p_sink_q = sink_q + i_t * sink_q_token + i_h * sink_q_head + o_sink_q
        b_sink_q = tl.load(p_sink_q, mask=in_gd, other=0.0).to(tl.float32)
        b_max = tl.full([BG], float("-inf"), tl.float32)
        b_mass = tl.zeros([BG], tl.float32)
        b_sum = tl.zeros([BG, BD], tl.float32)
        filled = tl.where(live, tl.minimum(position + 1, M + W), 0)
        for i_row in range(0, filled, BN):
            o_n = i_row + tl.arange(0, BN)
            in_nd = (o_n < filled)[:, None] & in_d[None, :]
            o_nd = o_n[:, None] * D + o_d[None, :]
            b_key = tl.load(p_keys + o_nd, mask=in_nd, other=0.0).to(tl.float32)
            b_value = tl.load(p_values + o_nd, mask=in_nd, other=0.0).to(tl.float32)
            b_query = tl.where((o_n < M)[None, :, None], b_sink_q[:, None, :], b_q[:, None, :])
            b_score = tl.sum(b_query * b_key[None, :, :], 2) * scale
            b_score = tl.where((o_n < filled)[None, :], b_score, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
            b_weight = tl.exp(b_score - b_new_max[:, None])
            b_carried = tl.exp(b_max - b_new_max)
            b_mass = b_carried * b_mass + tl.sum(b_weight, 1)
            b_sum = b_carried[:, None] * b_sum + tl.sum(b_weight[:, :, None] * b_value[None, :, :], 1)
            b_max = b_new_max

        o_out = (i_t * H + i_h) * G + o_g
        tl.store(o + o_out[:, None] * D + o_d[None, :], tl.where(live, b_sum / b_mass[:, None], 0.0), mask=in_gd)
        tl.store(log_mass + o_out, tl.where(live, b_max + tl.log(b_mass), 0.0), mask=o_g < G)
        tl.store(row_max + o_out, tl.where(live, b_max, 0.0), mask=o_g < G)


@triton.jit
def _attend(b_q, b_key, b_value, visible, b_max, b_mass, b_sum, scale, PRECISION: tl.constexpr):
    """Adds a block of rows to a softmax that keeps its running maximum."""
    b_score = tl.dot(b_q, tl.trans(b_key), input_precision=PRECISION) * scale
    b_score = tl.where(visible, b_score, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
    shift = shift_of(b_new_max)
    b_weight = tl.exp(b_score - shift[:, None])
    b_carried = tl.exp(b_max - shift)
    b_mass = b_carried * b_mass + tl.sum(b_weight, 1)
    b_sum = tl.dot(b_weight, b_value, b_carried[:, None] * b_sum, input_precision=PRECISION)
    return b_new_max, b_mass, b_sum


@triton.jit
def _load_rows(p_rows, stride, o_n, inside, D: tl.constexpr, BD: tl.constexpr, STORED: tl.constexpr):
    """[BN, BD] rows in float32, rounded as the buffer would; 0 outside."""
    o_d = tl.arange(0, BD)
    mask = inside[:, None] & (o_d < D)[None, :]
    return tl.load(p_rows + o_n[:, None] * stride + o_d[None, :], mask=mask, other=0.0).to(STORED).to(tl.float32)


@triton.jit(do_not_specialize=["S", "steps"])
def ring_attention_chunk(
    q, q_token, q_head, q_group, sink_q, sink_q_token, sink_q_head, sink_q_group,
    k, k_token, k_head, v, v_token, v_head, keys, keys_slot, values, values_slot,
    positions, slots, cu_seqlens, o, log_mass, row_max, scale, S, steps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """C tokens of one head at once, their query heads side by side: row i of a block is token i // BG, query i % BG.

    Reads the buffer as it was before the call; `ring_attention_write` fills it afterwards. o_p: positions.
    """
    i_h = tl.program_id(0) % H
    i_block = tl.program_id(0) // H
    i_s = sequence_of_block(cu_seqlens, i_block, steps, S, C)
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    first = tl.load(positions + i_s).to(tl.int64)
    i_first = start + (i_block - first_block(start, i_s, C)) * C
    if i_first >= end:
        return
    live = slot >= 0
    STORED: tl.constexpr = keys.dtype.element_ty
    o_g = tl.arange(0, C * BG) % BG
    o_t = i_first + tl.arange(0, C * BG) // BG
    in_q = (o_t < end) & (o_g < G)
    o_query = (first + o_t - start)[:, None]
    seen = first + tl.minimum(i_first + C, end) - start
    p_keys = keys + slot * keys_slot + i_h * ((M + W) * D)
    p_values = values + slot * values_slot + i_h * ((M + W) * D)
    p_k = k + (start - first) * k_token + i_h * k_head  # of position 0, had the call begun there
    p_v = v + (start - first) * v_token + i_h * v_head
    b_max = tl.full([C * BG], float("-inf"), tl.float32)
    b_mass, b_sum = tl.zeros([C * BG], tl.float32), tl.zeros([C * BG, BD], tl.float32)

    b_q = _load_rows(
        sink_q + i_h * sink_q_head + o_g[:, None] * sink_q_group, sink_q_token, o_t, in_q, D, BD, tl.float32
    )
    for i_p in range(0, tl.minimum(seen, M), BN):
        o_p = i_p + tl.arange(0, BN)
        old = (o_p < tl.minimum(first, M)) & live
        new = (o_p >= first) & (o_p < tl.minimum(seen, M))
        b_key = _load_rows(p_keys, D, o_p, old, D, BD, STORED) + _load_rows(p_k, k_token, o_p, new, D, BD, STORED)
        b_value = _load_rows(p_values, D, o_p, old, D, BD, STORED) + _load_rows(p_v, v_token, o_p, new, D, BD, STORED)
        visible = (o_p[None, :] <= o_query) & (o_p < M)[None, :]
        b_max, b_mass, b_sum = _attend(b_q, b_key, b_value, visible, b_max, b_mass, b_sum, scale, PRECISION)

    b_q = _load_rows(q + i_h * q_head + o_g[:, None] * q_group, q_token, o_t, in_q, D, BD, tl.float32)
    oldest = tl.maximum(first + i_first - start - W + 1, M)
    for i_p in range(oldest, first, BN):
        o_p = i_p + tl.arange(0, BN)
        old = (o_p < first) & live
        b_key = _load_rows(p_keys, D, row_of(o_p, M, W), old, D, BD, STORED)
        b_value = _load_rows(p_values, D, row_of(o_p, M, W), old, D, BD, STORED)
        visible = (o_p[None, :] > o_query - W) & (o_p < first)[None, :]
        b_max, b_mass, b_sum = _attend(b_q, b_key, b_value, visible, b_max, b_mass, b_sum, scale, PRECISION)
    for i_p in range(tl.maximum(oldest, first), seen, BN):
        o_p = i_p + tl.arange(0, BN)
        b_key = _load_rows(p_k, k_token, o_p, o_p < seen, D, BD, STORED)
        b_value = _load_rows(p_v, v_token, o_p, o_p < seen, D, BD, STORED)
        visible = (o_p[None, :] <= o_query) & (o_p[None, :] > o_query - W)
        b_max, b_mass, b_sum = _attend(b_q, b_key, b_value, visible, b_max, b_mass, b_sum, scale, PRECISION)

    o_d = tl.arange(0, BD)
    o_out = (o_t * H + i_h) * G + o_g
    b_o = tl.where(live, b_sum / b_mass[:, None], 0.0)
    tl.store(o + o_out[:, None] * D + o_d[None, :], b_o, mask=in_q[:, None] & (o_d < D)[None, :])
    tl.store(log_mass + o_out, tl.where(live, b_max + tl.log(b_mass), 0.0), mask=in_q)
    tl.store(row_max + o_out, tl.where(live, b_max, 0.0), mask=in_q)


@triton.jit
def ring_attention_write(
    k, k_token, k_head, v, v_token, v_head, keys, keys_slot, values, values_slot, positions, slots, cu_seqlens,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Every buffer row takes the last token of the call that belongs there, if one does. A program owns BN rows."""
    blocks: tl.constexpr = (M + W + BN - 1) // BN
    i_program = tl.program_id(0)
    o_n = i_program % blocks * BN + tl.arange(0, BN)
    i_h = i_program // blocks % H
    i_s = i_program // (blocks * H)
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    first = tl.load(positions + i_s).to(tl.int64)
    o_d = tl.arange(0, BD)
    newest = first + end - start - 1
    behind = (newest - o_n + W * (M + 2)) % W  # the last position of this row, counted back from the newest
    position = tl.where(o_n < M, o_n, newest - behind)
    taken = (position >= first) & (position <= newest) & ((o_n < M) | (position >= M))
    mask = (taken & (o_n < M + W) & (slot >= 0))[:, None] & (o_d < D)[None, :]
    o_t = (start + position - first)[:, None]
    b_k = tl.load(k + o_t * k_token + i_h * k_head + o_d[None, :], mask=mask, other=0.0)
    b_v = tl.load(v + o_t * v_token + i_h * v_head + o_d[None, :], mask=mask, other=0.0)
    o_row = i_h * ((M + W) * D) + o_n[:, None] * D + o_d[None, :]
    tl.store(keys + slot * keys_slot + o_row, b_k, mask=mask)
    tl.store(values + slot * values_slot + o_row, b_v, mask=mask)
