"""Pieces of kernels that work with logarithms: running maxima, and sums of log-decays between two tokens."""

import triton
import triton.language as tl


@triton.jit
def shift_of(b_max):
    """What to subtract from exponents that b_max bounds: itself, or 0 where it is -inf, as -inf - -inf is NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def larger(a, b):
    """The combine function of a running maximum."""
    return tl.maximum(a, b)


@triton.jit
def _add_parts(coarse, fine, closed, more_coarse, more_fine, more_closed):
    return coarse + more_coarse, fine + more_fine, closed + more_closed


@triton.jit
def running_sums(b_log):
    """Running sums of up to 64 log-decays, in parts whose differences are exact or nearly so: see `sum_between`.

    The coarse part is a multiple of 1/4, so its sums are exact and the fine sums stay small. Gates from -2^16 down are
    counted as closed instead.
    """
    closed = b_log <= -65536.0
    b_log = tl.where(closed, 0.0, b_log)
    b_coarse = tl.floor(b_log * 4.0 + 0.5) * 0.25
    return tl.associative_scan((b_coarse, b_log - b_coarse, closed.to(tl.int32)), 0, _add_parts)


@triton.jit
def sum_between(b_coarse, b_fine, b_closed, coarse, fine, closed):
    """The sum of log-decays from one place (the last three) to another; a closed gate between them makes it -inf."""
    return tl.where(b_closed > closed, float("-inf"), (b_coarse - coarse) + (b_fine - fine))
