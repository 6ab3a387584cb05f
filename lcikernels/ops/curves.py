"""What Triton kernels share: functions of a number in float32, as exact as a GPU's exp2 (2 ulps); a mask;
which state a step has."""

import triton
from triton import language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1]: a polynomial, 1.5 ulps at most. tl.log(1 + u) would lose a small u."""
    p = -0.003318444127216935
    p = p * u + 0.0202044565230608
    p = p * u - 0.05766420438885689
    p = p * u + 0.10680530965328217
    p = p * u - 0.1535538136959076
    p = p * u + 0.19695395231246948
    p = p * u - 0.24958586692810059
    p = p * u + 0.33330512046813965
    p = p * u - 0.4999993145465851
    return (p * u) * u + u


@triton.jit
def exp_minus(x):
    """e^-x."""
    return tl.math.exp2(x * -LOG2E)


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    most = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return most + log1p(exp_minus(tl.abs(x)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp_minus(x))


@triton.jit
def sigmoid_slope(x):
    """s (1 - s), where u s is 1 - s without cancellation; u is finite, and a NaN one."""
    u = tl.minimum(exp_minus(x), 2.0**126, propagate_nan=tl.PropagateNan.ALL)
    s = 1.0 / (1.0 + u)
    return s * (u * s)


@triton.jit
def softplus_slope(x):
    return sigmoid(x)


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return x / (1.0 + exp_minus(x))


@triton.jit
def silu_slope(x):
    """silu' = s + silu (1 - s), with u as sigmoid_slope has it."""
    u = tl.minimum(exp_minus(x), 2.0**126, propagate_nan=tl.PropagateNan.ALL)
    s = 1.0 / (1.0 + u)
    return s + (x * s) * (u * s)


@triton.jit
def within(m, condition):
    """m where a scalar condition holds. m & condition would be an integer in Triton's interpreter."""
    return tl.where(condition, m, False)


@triton.jit
def state_of(p_rows, i_b, S):
    """Which of S states row i_b has, in int64, and whether there is such a one."""
    if p_rows is None:
        return i_b.to(tl.int64), i_b < S
    else:
        i_s = tl.load(p_rows + i_b).to(tl.int64)
        return i_s, (i_s >= 0) & (i_s < S)


@triton.jit
def of_state(y, p_rows, i_s, S):
    """y, or 0 for padding, or NaN where there are not so many: to say so would be to wait."""
    if p_rows is None:
        return y
    else:
        return tl.where(i_s < 0, 0.0, tl.where(i_s < S, y, float("nan")))
