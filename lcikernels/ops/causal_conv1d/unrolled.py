"""The convolution and its gradients with the taps unrolled, the window of W tokens in registers."""

import triton
from triton import language as tl

from ..curves import silu, silu_slope, within
from .tiles import begin_at, channels, fetch, filters, locate, put, put_run, token


@triton.jit
def convolve(x, taps, bias, j: tl.constexpr, W: tl.constexpr):
    for w in tl.static_range(W):
        bias = x[j + w] * taps[w] + bias
    return bias


@triton.jit
def forward_kernel(
    x, y, given, p_final, T, D, N, BT, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr
):
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    row, n, t, begin, own, end = locate(i_t, given.cu, T, N, BT, 0)
    p_x, p_y, p_initial = begin_at(x, row, t), begin_at(y, row, t), given.initial
    p_final += n * D * (W - 1)
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    taps, bias = filters(given, o_d, m_d, W)
    xs = ()
    for w in tl.static_range(W - 1):
        xs = xs + (token(x, p_x, p_initial, w - (W - 1), begin, end, o_d, m_d, W),)
    if (own == end) & ((own > 0) | (begin == 0)):
        for w in tl.static_range(W - 1):
            last = token(x, p_x, p_initial, end - (W - 1) + w, begin, end, o_d, m_d, W)
            tl.store(p_final + o_d * (W - 1) + w, last, m_d)
    for s in range(0, own, U):
        xs, ys = xs + fetch(x, p_x, s, own, o_d, m_d, U), ()
        for j in tl.static_range(U):
            out = convolve(xs, taps, bias, j, W)
            if SILU:
                out = silu(out)
            if y.token is None:
                ys = ys + (out,)
            else:
                put(y, p_y, s + j, out, within(m_d, s + j < own), o_d)
        if y.token is None:
            put_run(y, p_y, s, own, ys, o_d, m_d, U)
        xs = xs[U:]


@triton.jit
def accumulate(sums, g, x, j: tl.constexpr, W: tl.constexpr):
    out = (sums[0] + g,)
    for w in tl.static_range(W):
        out = out + (g * x[j + w] + sums[w + 1],)
    return out


@triton.jit
def of_token(g, taps, p_dfinal, i, o_d, m_d, j: tl.constexpr, W: tl.constexpr):
    """The gradient of the token W-1 before the one that brought g[j + W-1], and is i behind the sequence."""
    grad = tl.zeros([o_d.shape[0]], tl.float32)
    if p_dfinal is not None:
        if i >= 0:
            grad += tl.load(p_dfinal + o_d * (W - 1) + i, within(m_d, i < W - 1), 0.0)
    for w in tl.static_range(W):
        grad = taps[w] * g[j + W - 1 - w] + grad
    return grad


@triton.jit
def backward_kernel(
    dy, x, dx, given, p_dfinal, p_dinitial, p_sums, T, D, N, BT,
    W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Token s brings the gradient g before its activation; with it that of token s-(W-1) is complete.

    Where dx lies along tokens, it is stored U tokens at a time, from a multiple of U on: the last U-(W-1) of
    dx that are complete wait for the next ones.
    """
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    row, n, t, begin, own, end = locate(i_t, given.cu, T, N, BT, 0)
    p_x, p_dy, p_dx = begin_at(x, row, t), begin_at(dy, row, t), begin_at(dx, row, t)
    p_initial = given.initial
    p_dinitial += n * D * (W - 1)
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    if p_dfinal is not None:
        p_dfinal += n * D * (W - 1)
    taps, bias = filters(given, o_d, m_d, W)
    xs, g, sums, dxs = (), (), (tl.zeros([BD], tl.float32),), ()  # sums: of the bias, then of the taps
    for w in tl.static_range(W - 1):
        xs = xs + (token(x, p_x, p_initial, w - (W - 1), begin, end, o_d, m_d, W),)
        g = g + (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([BD], tl.float32),)
    reach = own + W - 1
    limit, last = tl.minimum(reach, end), reach
    if dx.token is None:
        last = own + U  # the last run of them is stored behind the last token
        for _ in tl.static_range(U - (W - 1)):
            dxs = dxs + (tl.zeros([BD], tl.float32),)
    for s in range(0, last, U):
        xs, dys = xs + fetch(x, p_x, s, limit, o_d, m_d, U), fetch(dy, p_dy, s, limit, o_d, m_d, U)
        for j in tl.static_range(U):
            now = dys[j]
            if SILU:
                now *= silu_slope(convolve(xs, taps, bias, j, W))
            g = g + (now,)
            if s + j < own:
                sums = accumulate(sums, now, xs, j, W)
            grad = of_token(g, taps, p_dfinal, s + j - end, o_d, m_d, j, W)
            if dx.token is None:
                dxs = dxs + (grad,)
                if (begin == 0) & (s + j < W - 1):
                    tl.store(p_dinitial + o_d * (W - 1) + s + j, grad, m_d)
            else:
                if s + j >= W - 1:
                    put(dx, p_dx, s + j - (W - 1), grad, within(m_d, s + j < reach), o_d)
                elif begin == 0:
                    tl.store(p_dinitial + o_d * (W - 1) + s + j, grad, m_d)
        if dx.token is None:
            if s > 0:
                put_run(dx, p_dx, s - U, own, dxs, o_d, m_d, U)
            dxs = dxs[U:]
        xs = xs[U:]
        g = g[U:]
    p_sums += i_t.to(tl.int64) * D * (W + 1)
    for w in tl.static_range(W + 1):
        tl.store(p_sums + w * D + o_d, sums[w], m_d)
