"""Where in the packed tokens a program works: searches over cu_seqlens, which stays on the device."""

import triton
import triton.language as tl


@triton.jit
def first_block(start, i_s, C: tl.constexpr):
    """The number of a sequence's first block of C tokens.

    Blocks are numbered without a sum over the sequences before: start // C + i_s leaves each enough numbers, some
    unused, and N // C + S are enough for all.
    """
    return start // C + i_s


@triton.jit
def sequence_of_block(cu_seqlens, i_block, steps, S, C: tl.constexpr):
    """The last sequence whose first block is not after this one; `steps` halvings find it among S."""
    low = i_block * 0
    high = low + S
    for _ in range(steps):
        middle = (low + high) // 2
        start = tl.load(cu_seqlens + middle)
        low = tl.where(first_block(start, middle, C) <= i_block, middle, low)
        high = tl.where(first_block(start, middle, C) <= i_block, high, middle)
    return low


@triton.jit
def sequence_of_token(cu_seqlens, o_t, steps, S):
    """The last sequence that starts at or before each token: the one that owns it."""
    low = o_t * 0
    high = low + S
    for _ in range(steps):
        middle = (low + high) // 2
        not_after = tl.load(cu_seqlens + middle) <= o_t
        low = tl.where(not_after, middle, low)
        high = tl.where(not_after, high, middle)
    return low
