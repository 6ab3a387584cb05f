"""Sums of rates in two float32 parts, as exact as float64, which a consumer's GPU has at 1/64 of the rate.

A rate is a multiple of 2^-8 and a rest. Of 256 multiples from -256 to 256 every sum is exact in float32, in
any order and every difference of two; the rests are at most 2^-9, and so are the ulps of their sums.
"""

import triton
from triton import language as tl

from ..curves import LN2

LEAST = tl.constexpr(-256.0)  # e to it is 0; less would leave the exact sums
# log2(e): its first 9 bits, so that multiples of 2^-8 below 128 have exact products with it, and the rest.
LOG2E_FIRST = tl.constexpr(1.44140625)
LOG2E_REST = tl.constexpr(0.0012887908889634074)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def running(p_rate, first, i_h, at, count, H: tl.constexpr, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Of the C tokens from `at` of a segment, of `count` from `first`: the sums of rates up to each, in two
    parts, and the sum of all, in two."""
    o_t = tl.arange(0, C)
    if PER_TOKEN:
        rate = tl.load(p_rate + (first + at) * H + i_h + o_t * H, at + o_t < count, 0.0)
    else:
        rate = tl.load(p_rate + i_h)
    rate = tl.where(rate < LEAST, LEAST, rate)
    coarse = tl.floor(rate * 256.0 + 0.5) * 0.00390625
    fine = rate - coarse
    if PER_TOKEN:
        end_coarse, end_fine = tl.sum(coarse, 0), tl.sum(fine, 0)
        coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    else:
        until = tl.minimum(o_t + 1, count - at).to(tl.float32)
        end = tl.minimum(C, count - at).to(tl.float32)
        end_coarse, end_fine, coarse, fine = end * coarse, end * fine, until * coarse, until * fine
    return coarse, fine, end_coarse, end_fine


@triton.jit
def power(coarse, fine):
    """e^(coarse + fine), as exact as a GPU's exp2 (2 ulps) of a float32 that the exponent is not."""
    near = coarse * LOG2E_FIRST
    more = coarse * LOG2E_REST + fine * LOG2E
    x = near + more
    y = tl.math.exp2(x)
    return y + y * ((more - (x - near)) * LN2)


@triton.jit
def between(coarse, fine, scale, BACKWARD: tl.constexpr):
    """scale times what token j keeps of token i, [i, j] for i <= j, else 0; BACKWARD: [j, i]."""
    o_t = tl.arange(0, coarse.numel)
    coarse, fine = coarse[:, None] - coarse[None, :], fine[:, None] - fine[None, :]
    m = o_t[:, None] >= o_t[None, :]
    if not BACKWARD:
        m, coarse, fine = o_t[:, None] <= o_t[None, :], -coarse, -fine
    return power(tl.where(m, coarse, LEAST), fine) * scale
