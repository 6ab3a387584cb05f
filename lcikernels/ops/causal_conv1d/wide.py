"""The convolution and its gradients for any number of taps, which kernels loop over."""

import triton
from triton import language as tl

from ..curves import silu, silu_slope
from ..views import steps
from .tiles import begin_at, channels, locate, put, token

RUN = tl.constexpr(16)  # taps added up before they join the others: hundreds lose fewer roundings


@triton.jit
def wide_forward_kernel(
    x, dy, y, given, p_final, T, D, N, W, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr
):
    """y and the final state; given dy, the gradient before the activation in y's place."""
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    o_d, m_d, o_t = o_d[None, :], m_d[None, :], tl.arange(0, BT)[:, None]
    row, n, t, begin, own, end = locate(i_t, given.cu, T, N, BT, 0)
    p_x, p_initial = begin_at(x, row, t), given.initial
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    if p_final is not None:
        if (own == end) & ((own > 0) | (begin == 0)):
            for w in range(0, W - 1, BT):
                i = w + o_t
                last = token(x, p_x, p_initial, end - (W - 1) + i, begin, end, o_d, m_d, W)
                tl.store(p_final + n * D * (W - 1) + o_d * (W - 1) + i, last, m_d & (i < W - 1))
    out = tl.zeros([BT, BD], tl.float32)
    if given.bias is not None:
        out += tl.load(given.bias + o_d, m_d, 0.0).to(tl.float32)
    for first in range(0, W, RUN):
        run = tl.zeros([BT, BD], tl.float32)
        for w in range(first, tl.minimum(first + RUN, W)):
            tap = tl.load(given.weight + o_d * W + w, m_d, 0.0).to(tl.float32)
            run += token(x, p_x, p_initial, o_t + w - (W - 1), begin, end, o_d, m_d, W) * tap
        out += run
    m = m_d & (o_t < own)
    if dy is not None:
        p_dy = begin_at(dy, row, t) + steps(o_t, dy.token) + steps(o_d, dy.channel)
        out = tl.load(p_dy, m, 0.0).to(tl.float32) * silu_slope(out)
    elif SILU:
        out = silu(out)
    put(y, begin_at(y, row, t), o_t, out, m, o_d)


@triton.jit
def wide_inputs_kernel(g, dx, given, p_dfinal, p_dinitial, T, D, N, W, BT: tl.constexpr, BD: tl.constexpr):
    """The gradients of the tokens and of the state before them, from those before the activation."""
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    o_d, m_d, o_t = o_d[None, :], m_d[None, :], tl.arange(0, BT)[:, None]
    row, n, t, begin, own, end = locate(i_t, given.cu, T, N, BT, W - 1)
    p_g = begin_at(g, row, t)
    grad = tl.zeros([BT, BD], tl.float32)
    if p_dfinal is not None:
        i = o_t - end + W - 1
        grad += tl.load(p_dfinal + n * D * (W - 1) + o_d * (W - 1) + i, m_d & (i >= 0) & (o_t < own), 0.0)
    for first in range(0, W, RUN):
        run = tl.zeros([BT, BD], tl.float32)
        for w in range(first, tl.minimum(first + RUN, W)):
            s = o_t + W - 1 - w
            m_g = m_d & (s >= begin) & (s < end)
            u = tl.load(p_g + steps(s, g.token) + steps(o_d, g.channel), m_g, 0.0).to(tl.float32)
            run += u * tl.load(given.weight + o_d * W + w, m_d, 0.0).to(tl.float32)
        grad += run
    m = m_d & (o_t < own)
    put(dx, begin_at(dx, row, t), o_t, grad, m & (o_t >= begin), o_d)
    i = o_t - begin + W - 1
    tl.store(p_dinitial + n * D * (W - 1) + o_d * (W - 1) + i, grad, m & (o_t < begin))


@triton.jit
def wide_weight_kernel(g, x, given, p_sums, T, D, N, W, BT: tl.constexpr, BD: tl.constexpr):
    """The gradient of one tap, summed over a sequence."""
    i, o_d, m_d = channels(tl.program_id(0), D, BD)
    i_t, w = i // W, i % W
    p_sums += i.to(tl.int64) * D + o_d
    m_sums = m_d
    o_d, m_d, o_t = o_d[None, :], m_d[None, :], tl.arange(0, BT)[:, None]
    row, n, t, begin, own, end = locate(i_t, given.cu, T, N, T, 0)
    p_x, p_g, p_initial = begin_at(x, row, t), begin_at(g, row, t), given.initial
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    sums = tl.zeros([BT, BD], tl.float32)
    for first in range(0, own, BT):
        s = first + o_t
        m = m_d & (s < own)
        u = tl.load(p_g + steps(s, g.token) + steps(o_d, g.channel), m, 0.0).to(tl.float32)
        sums += u * token(x, p_x, p_initial, s + w - (W - 1), begin, end, o_d, m, W)
    tl.store(p_sums, tl.sum(sums, 0), m_sums)
