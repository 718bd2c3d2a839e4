"""Norms over rows of C channels, BR rows to a program, and the rotary embedding, one token to a program.

b_: block in registers, float32; o_: offsets; i_: index.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def norm_rows(
    x, x_row, weight, y, N, eps, C: tl.constexpr, MEAN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """x / sqrt(mean or sum of x^2 + eps), times the weight if there is one."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    mask = (o_r < N)[:, None] & (o_c < C)[None, :]
    b_x = tl.load(x + o_r[:, None] * x_row + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_square = tl.sum(b_x * b_x, 1)
    if MEAN:
        b_square = b_square / C
    b_y = b_x * tl.rsqrt(b_square + eps)[:, None]
    if weight is not None:
        b_y *= tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + o_r[:, None] * C + o_c[None, :], b_y, mask=mask)


@triton.jit
def rotate_pairs(
    x, x_token, x_head, cos, cos_token, sin, sin_token, y,
    H: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(x_i, x_{i + HALF}) turned by the token's angles, for every head."""
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BH)
    o_d = tl.arange(0, BD)
    in_d = o_d < HALF
    mask = (o_h < H)[:, None] & in_d[None, :]
    b_cos = tl.load(cos + i_t * cos_token + o_d, mask=in_d, other=0.0)[None, :]
    b_sin = tl.load(sin + i_t * sin_token + o_d, mask=in_d, other=0.0)[None, :]
    p_x = x + i_t * x_token + o_h[:, None] * x_head + o_d[None, :]
    b_first = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + HALF, mask=mask, other=0.0).to(tl.float32)
    p_y = y + (i_t * H + o_h[:, None]) * (2 * HALF) + o_d[None, :]
    tl.store(p_y, b_first * b_cos - b_second * b_sin, mask=mask)
    tl.store(p_y + HALF, b_second * b_cos + b_first * b_sin, mask=mask)
