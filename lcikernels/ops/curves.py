"""What Triton kernels compute of one number, in float32: within 3 ulps of a GPU's exp2, which is within 2."""

import triton
from triton import language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1]: a polynomial, 2 ulps at most. tl.log(1 + u) would lose a small u."""
    p = 0.005364777520298958
    p = p * u - 0.03006560541689396
    p = p * u + 0.07920423150062561
    p = p * u - 0.13753776252269745
    p = p * u + 0.19153642654418945
    p = p * u - 0.24857160449028015
    p = p * u + 0.333213210105896
    p = p * u - 0.49999648332595825
    p = p * u + 1.0
    return p * u


@triton.jit
def exp_minus(x):
    """e^-x, at most 2^126, so that what is divided by it or times it stays finite; a NaN stays one."""
    t = -x * LOG2E
    return tl.math.exp2(tl.where(t > 126.0, 126.0, t))


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.where(x > 0, x, 0.0) + log1p(exp_minus(tl.abs(x)))


@triton.jit
def softplus_slope(x):
    return 1.0 / (1.0 + exp_minus(x))


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return x / (1.0 + exp_minus(x))


@triton.jit
def silu_slope(x):
    """silu' = s + silu (1 - s); 1 - s is computed without cancellation."""
    u = exp_minus(x)
    s = 1.0 / (1.0 + u)
    return s * (1.0 + x * (u * s))
