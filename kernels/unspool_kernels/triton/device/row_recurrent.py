"""The row kernel, token by token: every flag, any length; one token is the decode step.

A program owns BR rows of one head's state in one sequence and keeps them in registers from the first token to the
last. p_: pointer to a token's or a head's part; b_: block in registers, float32; o_: offsets; i_: index.
"""

import triton
import triton.language as tl

from unspool_kernels.triton.device.log_space import shift_of


@triton.jit
def _decayed(b_state, p_decay, o_row, o_k, V: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr):
    if GATE == "key":
        b_state = b_state * tl.exp(tl.load(p_decay + o_k, mask=o_k < K, other=0.0))[None, :]
    elif GATE == "value":
        b_state = b_state * tl.exp(tl.load(p_decay + o_row, mask=o_row < V, other=0.0))[:, None]
    elif GATE != "none":
        b_state = b_state * tl.exp(tl.load(p_decay))
    return b_state


@triton.jit
def _store_read(b_state, p_q, q_group, p_o, b_direct, p_bonus, b_k, live, o_row, o_k, K: tl.constexpr, R: tl.constexpr,
                G: tl.constexpr):  # fmt: skip
    """o_g = S q_g + (q_g . (bonus k)) v for every query head; b_direct is that v, p_bonus None leaves the term out."""
    for i_g in tl.static_range(G):
        b_q = tl.load(p_q + i_g * q_group + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_o = tl.sum(b_state * b_q[None, :], 1)
        if p_bonus is not None:
            b_bonus = tl.load(p_bonus + o_k, mask=o_k < K, other=0.0)
            b_o += tl.sum(b_q * b_bonus * b_k, 0) * b_direct
        tl.store(p_o + i_g * R + o_row, tl.where(live, b_o, 0.0), mask=o_row < R)


@triton.jit
def row_recurrent(
    q, q_token, q_head, q_group, k, k_token, k_head, v, v_token, v_head,
    log_decay, log_decay_token, log_decay_head,
    erase_read, erase_read_token, erase_read_head, erase_write, erase_write_token, erase_write_head,
    beta, beta_token, bonus, bonus_head, log_input, log_input_token,
    state, state_slot, max_state, max_state_slot, slots, cu_seqlens, o, m,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, READ: tl.constexpr, STABILIZER: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """S_t = S_{t-1} (diag(a) + p b^T) + v k^T; o_t = S_t q_t. Row V of the state, if there is one, has v = 1."""
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
    in_k = o_k < K

    p_state = state + slot * state_slot + i_h * (R * K) + o_row[:, None] * K + o_k[None, :]
    in_state = (o_row < R)[:, None] & in_k[None, :] & live
    b_state = tl.load(p_state, mask=in_state, other=0.0).to(tl.float32)
    if STABILIZER:
        b_max = tl.load(max_state + slot * max_state_slot + i_h, mask=live, other=0.0)

    for i_t in range(start, end):
        b_k = tl.load(k + i_t * k_token + i_h * k_head + o_k, mask=in_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + i_t * v_token + i_h * v_head + o_row, mask=o_row < V, other=0.0).to(tl.float32)
        if R > V:
            b_v = tl.where(o_row == V, 1.0, b_v)
        p_decay = log_decay + i_t * log_decay_token + i_h * log_decay_head if GATE != "none" else None
        p_q = q + i_t * q_token + i_h * q_head
        p_o = o + (i_t * H + i_h) * (G * R)

        if READ == "before":
            p_bonus = bonus + i_h * bonus_head if bonus is not None else None
            _store_read(b_state, p_q, q_group, p_o, b_v, p_bonus, b_k, live, o_row, o_k, K, R, G)
        if STABILIZER:
            b_kept = tl.load(p_decay) + b_max
            b_input = tl.load(log_input + i_t * log_input_token + i_h)
            b_max = tl.maximum(b_kept, b_input)
            shift = shift_of(b_max)
            b_state = b_state * tl.exp(b_kept - shift)
            b_v = b_v * tl.exp(b_input - shift)
            tl.store(m + i_t * H + i_h, tl.where(live, b_max, 0.0), mask=i_row == 0)
        elif ERASE == "general":
            b_p = tl.load(erase_read + i_t * erase_read_token + i_h * erase_read_head + o_k, mask=in_k, other=0.0)
            b_b = tl.load(erase_write + i_t * erase_write_token + i_h * erase_write_head + o_k, mask=in_k, other=0.0)
            b_read = tl.sum(b_state * b_p.to(tl.float32)[None, :], 1)
            b_state = _decayed(b_state, p_decay, o_row, o_k, V, K, GATE) + b_read[:, None] * b_b.to(tl.float32)[None, :]
        else:
            b_state = _decayed(b_state, p_decay, o_row, o_k, V, K, GATE)
        if ERASE == "parallel":
            b_v = (b_v - tl.sum(b_state * b_k[None, :], 1)) * tl.load(beta + i_t * beta_token + i_h)
        b_state += b_v[:, None] * b_k[None, :]
        if READ == "after":
            _store_read(b_state, p_q, q_group, p_o, b_v, None, b_k, live, o_row, o_k, K, R, G)

    tl.debug_barrier()  # threads may hold copies of one element, and only one of them stores it
    tl.store(p_state, b_state, mask=in_state & (end > start))


@triton.jit(do_not_specialize=["S"])
def keep_last_max(
    m, max_state, max_state_slot, slots, cu_seqlens, S, H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """max_state[slot] = m of the sequence's last token. Runs after the row kernel, whose programs share max_state."""
    i_pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_s, i_h = i_pair // H, i_pair % H
    inside = i_s < S
    slot = tl.load(slots + i_s, mask=inside, other=-1).to(tl.int64)
    start = tl.load(cu_seqlens + i_s, mask=inside, other=0)
    end = tl.load(cu_seqlens + i_s + 1, mask=inside, other=0).to(tl.int64)
    written = (slot >= 0) & (end > start)
    b_max = tl.load(m + (end - 1) * H + i_h, mask=written, other=0.0)
    tl.store(max_state + slot * max_state_slot + i_h, b_max, mask=written)
