"""The causal depthwise convolution over a ring of its last inputs, and the token shift.

p_: pointer; b_: block in registers, float32; o_: offsets; i_: index.
"""

import triton
import triton.language as tl

from unspool_kernels.triton.device.packing import sequence_of_token


@triton.jit(do_not_specialize=["N", "S", "steps"])
def short_conv_outputs(
    x, x_token, weight, weight_channel, bias, state, state_slot, cursor, cursor_slot, slots, cu_seqlens, y, N, S, steps,
    C: tl.constexpr, W: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y_t = act(bias + sum_j weight[W - 1 - j] x_{t-j}) for BT packed tokens, of whatever sequences, and BC channels.

    Reads the ring as it was before the call; `short_conv_write` moves it on afterwards.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    o_t = tl.program_id(0) // blocks * BT + tl.arange(0, BT)
    o_c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    in_t, in_c = o_t < N, o_c < C
    i_s = sequence_of_token(cu_seqlens, tl.minimum(o_t, N - 1), steps, S)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    slot = tl.load(slots + i_s).to(tl.int64)
    live = slot >= 0
    oldest = tl.load(cursor + slot * cursor_slot, mask=live, other=0)
    p_x = x + o_t.to(tl.int64)[:, None] * x_token + o_c[None, :]
    p_weight = weight + o_c * weight_channel

    b_x = tl.load(p_x, mask=in_t[:, None] & in_c[None, :], other=0.0).to(tl.float32)
    b_y = b_x * tl.load(p_weight + W - 1, mask=in_c, other=0.0).to(tl.float32)[None, :]
    for i_back in tl.static_range(1, W):
        in_call = in_t & (o_t - i_back >= start)
        b_x = tl.load(p_x - i_back * x_token, mask=in_call[:, None] & in_c[None, :], other=0.0)
        b_x = b_x.to(state.dtype.element_ty).to(tl.float32)
        i_row = (oldest + (o_t - start) - i_back + (W - 1)) % (W - 1)
        p_row = state + slot[:, None] * state_slot + i_row[:, None] * C + o_c[None, :]
        in_ring = in_t & (o_t - i_back < start) & live
        b_x += tl.load(p_row, mask=in_ring[:, None] & in_c[None, :], other=0.0).to(tl.float32)
        b_y += b_x * tl.load(p_weight + W - 1 - i_back, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu":
        b_y = b_y / (1.0 + tl.exp(-b_y))
    p_y = y + o_t.to(tl.int64)[:, None] * C + o_c[None, :]
    tl.store(p_y, tl.where(live[:, None], b_y, 0.0), mask=in_t[:, None] & in_c[None, :])


@triton.jit
def short_conv_write(
    x, x_token, state, state_slot, cursor, cursor_slot, slots, cu_seqlens,
    C: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last W - 1 tokens of each sequence into its ring. A program owns one sequence: its cursor, all channels."""
    i_s = tl.program_id(0)
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    oldest = tl.load(cursor + slot * cursor_slot, mask=live, other=0)
    o_t = end - 1 - tl.arange(0, BW)
    taken = (o_t >= start) & (o_t >= end - (W - 1)) & live
    i_row = (oldest + o_t - start) % (W - 1)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        mask = taken[:, None] & (o_c < C)[None, :]
        b_x = tl.load(x + o_t[:, None] * x_token + o_c[None, :], mask=mask, other=0.0)
        tl.store(state + slot * state_slot + i_row[:, None] * C + o_c[None, :], b_x, mask=mask)
    tl.debug_barrier()  # threads may hold copies of one cursor, and only one of them stores it
    tl.store(cursor + slot * cursor_slot, ((oldest + end - start) % (W - 1)).to(tl.int32), mask=live)


@triton.jit
def token_shift_blocks(
    x, x_token, state, state_slot, slots, cu_seqlens, previous, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """The token before each token, as the state stores it. A program owns BC channels of one sequence."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    i_s = tl.program_id(0) // blocks
    o_c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    in_c = o_c < C
    slot = tl.load(slots + i_s).to(tl.int64)
    start = tl.load(cu_seqlens + i_s).to(tl.int64)
    end = tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    live = slot >= 0
    p_state = state + slot * state_slot + o_c
    stored = state.dtype.element_ty
    b_first = tl.load(p_state, mask=in_c & live, other=0.0)
    for i_first in range(start, end, BT):
        o_t = i_first + tl.arange(0, BT)
        in_call = (o_t > start) & (o_t < end)
        p_x = x + (o_t[:, None] - 1) * x_token + o_c[None, :]
        b_x = tl.load(p_x, mask=in_call[:, None] & in_c[None, :], other=0.0).to(stored)
        b_x = tl.where((o_t == start)[:, None], b_first[None, :], b_x)
        p_previous = previous + o_t[:, None] * C + o_c[None, :]
        tl.store(p_previous, tl.where(live, b_x, 0.0), mask=(o_t < end)[:, None] & in_c[None, :])
    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    written = in_c & live & (end > start)
    b_last = tl.load(x + (end - 1) * x_token + o_c, mask=written, other=0.0)
    tl.store(p_state, b_last, mask=written)
