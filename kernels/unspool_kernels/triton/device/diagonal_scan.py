"""First-order scans token by token. A program owns BC channels of one sequence, all M features of them.

p_: pointer; b_: block in registers, float32; o_: offsets; i_: index.
"""

import triton
import triton.language as tl


@triton.jit
def diagonal_scan_recurrent(
    x, x_token, x_channel, decay, decay_token, decay_channel, read, read_token, read_channel,
    state, state_slot, slots, cu_seqlens, h,
    C: tl.constexpr, M: tl.constexpr, SUMMED: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """h_t = a_t h_{t-1} + x_t; stores h [N, C, M], or with SUMMED sum_m read h [N, C]."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    i_s = tl.program_id(0) // blocks
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    o_c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    o_m = tl.arange(0, BM)
    mask = (o_c < C)[:, None] & (o_m < M)[None, :]
    o_cm = o_c[:, None] * M + o_m[None, :]
    p_state = state + slot * state_slot + o_cm
    b_h = tl.load(p_state, mask=mask & live, other=0.0).to(tl.float32)
    for i_t in range(start, end):
        p_x = x + i_t * x_token + o_c[:, None] * x_channel + o_m[None, :]
        p_decay = decay + i_t * decay_token + o_c[:, None] * decay_channel + o_m[None, :]
        b_h = tl.load(p_decay, mask=mask, other=0.0) * b_h + tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        if SUMMED:
            p_read = read + i_t * read_token + o_c[:, None] * read_channel + o_m[None, :]
            b_y = tl.sum(b_h * tl.load(p_read, mask=mask, other=0.0).to(tl.float32), 1)
            tl.store(h + i_t * C + o_c, tl.where(live, b_y, 0.0), mask=o_c < C)
        else:
            tl.store(h + i_t * (C * M) + o_cm, tl.where(live, b_h, 0.0), mask=mask)
    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    tl.store(p_state, b_h, mask=mask & live & (end > start))


@triton.jit
def complex_scan_recurrent(
    x, x_token, x_channel, x_feature, decay, decay_token, decay_channel, decay_feature,
    read, read_token, read_channel, read_feature,
    state, state_slot, slots, cu_seqlens, h,
    C: tl.constexpr, M: tl.constexpr, SUMMED: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """As `diagonal_scan_recurrent` over (real, imaginary) pairs; with SUMMED 2 Re(sum_m read h) [N, C]."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    i_s = tl.program_id(0) // blocks
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    o_c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    o_m = tl.arange(0, BM)
    mask = (o_c < C)[:, None] & (o_m < M)[None, :]
    o_pair = 2 * (o_c[:, None] * M + o_m[None, :])
    p_state = state + slot * state_slot + o_pair
    b_real = tl.load(p_state, mask=mask & live, other=0.0).to(tl.float32)
    b_imaginary = tl.load(p_state + 1, mask=mask & live, other=0.0).to(tl.float32)
    for i_t in range(start, end):
        p_x = x + i_t * x_token + o_c[:, None] * x_channel + o_m[None, :] * x_feature
        p_decay = decay + i_t * decay_token + o_c[:, None] * decay_channel + o_m[None, :] * decay_feature
        b_a, b_b = tl.load(p_decay, mask=mask, other=0.0), tl.load(p_decay + 1, mask=mask, other=0.0)
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        b_y = tl.load(p_x + 1, mask=mask, other=0.0).to(tl.float32)
        b_old = b_real
        b_real = b_a * b_old - b_b * b_imaginary + b_x
        b_imaginary = b_a * b_imaginary + b_b * b_old + b_y
        if SUMMED:
            p_read = read + i_t * read_token + o_c[:, None] * read_channel + o_m[None, :] * read_feature
            b_a = tl.load(p_read, mask=mask, other=0.0).to(tl.float32)
            b_b = tl.load(p_read + 1, mask=mask, other=0.0).to(tl.float32)
            b_sum = 2.0 * tl.sum(b_a * b_real - b_b * b_imaginary, 1)
            tl.store(h + i_t * C + o_c, tl.where(live, b_sum, 0.0), mask=o_c < C)
        else:
            tl.store(h + i_t * (2 * C * M) + o_pair, tl.where(live, b_real, 0.0), mask=mask)
            tl.store(h + i_t * (2 * C * M) + o_pair + 1, tl.where(live, b_imaginary, 0.0), mask=mask)
    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    tl.store(p_state, b_real, mask=mask & live & (end > start))
    tl.store(p_state + 1, b_imaginary, mask=mask & live & (end > start))


@triton.jit
def exponential_scan_recurrent(
    k, k_token, v, v_token, decay, bonus, state, state_slot, slots, cu_seqlens, y, C: tl.constexpr, BC: tl.constexpr
):
    """RWKV-4: y = (A + e^(u+k) v) / (B + e^(u+k)), then A <- e^w A + e^k v, B <- e^w B + e^k, all scaled by e^-max."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    i_s = tl.program_id(0) // blocks
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    o_c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    in_c = o_c < C
    p_state = state + slot * state_slot + o_c * 3
    b_top = tl.load(p_state, mask=in_c & live, other=0.0).to(tl.float32)
    b_bottom = tl.load(p_state + 1, mask=in_c & live, other=0.0).to(tl.float32)
    b_max = tl.load(p_state + 2, mask=in_c & live, other=0.0).to(tl.float32)
    b_decay = tl.load(decay + o_c, mask=in_c, other=0.0)
    b_bonus = tl.load(bonus + o_c, mask=in_c, other=0.0)
    for i_t in range(start, end):
        b_k = tl.load(k + i_t * k_token + o_c, mask=in_c, other=0.0).to(tl.float32)
        b_v = tl.load(v + i_t * v_token + o_c, mask=in_c, other=0.0).to(tl.float32)
        shift = tl.maximum(b_max, b_k + b_bonus)
        b_carried, b_own = tl.exp(b_max - shift), tl.exp(b_k + b_bonus - shift)
        b_y = (b_carried * b_top + b_own * b_v) / (b_carried * b_bottom + b_own)
        tl.store(y + i_t * C + o_c, tl.where(live, b_y, 0.0), mask=in_c)
        b_kept = b_max + b_decay
        b_max = tl.maximum(b_kept, b_k)
        b_carried, b_own = tl.exp(b_kept - b_max), tl.exp(b_k - b_max)
        b_top = b_carried * b_top + b_own * b_v
        b_bottom = b_carried * b_bottom + b_own
    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    written = in_c & live & (end > start)
    tl.store(p_state, b_top, mask=written)
    tl.store(p_state + 1, b_bottom, mask=written)
    tl.store(p_state + 2, b_max, mask=written)
