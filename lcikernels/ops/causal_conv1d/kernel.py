"""The causal convolution in Triton. A program walks tokens of one sequence, the window of W in registers.

    i_  index of a tile     o_  offsets (tl.arange)     m_  mask     p_  pointers

A lane has channels of its own, and takes U tokens at a time. Where channels lie beside each other in memory,
U loads get them, each of all lanes together; where tokens do, one load of each lane, 16 bytes of a channel at
a time: U of 16 bits make whole sectors of 32 bytes, so that memory moves nothing twice, and no lane needs
what another one has. x, y, dy and dx may each lie either way (see `Tokens`).

Filters of 2 to 4 taps have them unrolled. The kernels called wide take any number: they loop over the taps.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import along_rows, boundaries, channels_first, contiguous, empty_as
from ..curves import of_state, silu, silu_slope, state_of, within
from ..launch import cdiv, power_of_2
from ..states import all_as_they_are
from ..views import apart, steps, together, tokens

UNROLLED = (2, 3, 4)  # taps
AHEAD = 8, 4  # tokens that a lane loads at once, forward and backward: 71 and 128 registers for 4 taps
BD = 128  # channels at most: 4 a lane
RUN_OF_TOKENS = 16, 32  # tokens and channels at most, where tokens lie beside each other: 1 a lane
WIDE = 16  # tokens of a wide kernel's tile
RUN = tl.constexpr(16)  # taps added up before they join the others: hundreds lose fewer roundings


class Tile(NamedTuple):
    """Channels and tokens of a program, tokens that it takes at once."""

    BD: int
    BT: int
    U: int


def tile(x: Tensor, ahead: int) -> Tile:
    """16 tokens, or as many as leave 4096 programs: 132 processors twice.

    The longer, the less is read twice (W-1 tokens on each side) and the fewer parts of the weight's gradient.
    """
    B, T, D = x.shape
    width, length = channels_at_once(D), 256
    if channels_first(x):
        ahead, width = RUN_OF_TOKENS[0], min(width, RUN_OF_TOKENS[1])
    while length > 16 and cdiv(B * T, length) * cdiv(D, width) < 4096:
        length //= 2
    return Tile(width, length, ahead)


class Filter(NamedTuple):
    """What is read besides x: weight [D, W], bias [D], the state before each sequence [N, D, W-1], where
    packed sequences begin."""

    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    cu: Tensor | None


def channels_at_once(D: int) -> int:
    return min(BD, power_of_2(D))


@triton.jit
def locate(i, p_cu, T, N, BT, BEFORE):
    """What tile `i` is: its row and sequence, its first token t, and, counted from t, the start of the
    sequence, the end of the tile's own tokens, the end of the sequence.

    A sequence has BEFORE tokens more, before its start. It has one tile at least, if it is empty, too.
    """
    if p_cu is None:
        count = tl.cdiv(T + BEFORE, BT)
        row = i // count
        n, begin, end, first = row, 0, T, row * count
    else:
        # Sequence n has the tiles from (cu[n] + n * BEFORE) // BT + n on: never too few, some without tokens.
        row, n, beyond = i * 0, i * 0, N
        while n + 1 < beyond:
            middle = (n + beyond) // 2
            left = (tl.load(p_cu + middle) + middle * BEFORE) // BT + middle <= i
            n, beyond = tl.where(left, middle, n), tl.where(left, beyond, middle)
        begin, end = tl.load(p_cu + n), tl.load(p_cu + n + 1)
        first = (begin + n * BEFORE) // BT + n
    t = begin - BEFORE + (i - first) * BT
    own = tl.maximum(tl.minimum(end - t, BT), 0)
    return row.to(tl.int64), n.to(tl.int64), (i * 0 + t).to(tl.int64), begin - t, own, end - t


@triton.jit
def channels(i, D, BD: tl.constexpr):
    """Tile and channels of program `i`."""
    blocks = tl.cdiv(D, BD)
    o_d = i % blocks * BD + tl.arange(0, BD)
    return i // blocks, o_d, o_d < D


@triton.jit
def begin_at(x, row, t):
    """Where token t of a row is."""
    return x.p + steps(row, x.row) + steps(t, x.token)


@triton.jit
def filters(given, o_d, m_d, W: tl.constexpr):
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(given.weight + o_d * W + w, m_d, 0.0).to(tl.float32),)
    bias = tl.zeros([o_d.shape[0]], tl.float32)
    if given.bias is not None:
        bias += tl.load(given.bias + o_d, m_d, 0.0).to(tl.float32)
    return taps, bias


@triton.jit
def token(x, p_x, p_initial, s, begin, end, o_d, m_d, W):
    """Token s of a sequence, or of the state before it."""
    m = within(m_d, (begin <= s) & (end > s))
    u = tl.load(p_x + steps(s, x.token) + steps(o_d, x.channel), m, 0.0).to(tl.float32)
    if p_initial is not None:
        i = W - 1 - begin + s
        u += tl.load(p_initial + o_d * (W - 1) + i, within(m_d, (i >= 0) & (begin > s)), 0.0)
    return u


@triton.jit
def fetch(x, p_x, s, stop, o_d, m_d, U: tl.constexpr):
    """The U tokens from s on, zeros from `stop` on, in float32."""
    if x.token is None:
        o_t = s + tl.arange(0, U)
        p = p_x + steps(o_d, x.channel)[:, None] + o_t[None, :]
        if s + U <= stop:
            run = tl.load(p, m_d[:, None], 0.0)
        else:  # a mask of single tokens would make single loads of them
            run = tl.load(p, m_d[:, None] & (o_t < stop)[None, :], 0.0)
        return apart(run.to(tl.float32), o_d.shape[0], U)
    else:
        us = ()
        for j in tl.static_range(U):
            p = p_x + steps(s + j, x.token) + steps(o_d, x.channel)
            us = us + (tl.load(p, within(m_d, s + j < stop), 0.0).to(tl.float32),)
        return us


@triton.jit
def put(y, p_y, s, value, m_d, o_d):
    """Stores one token of memory of our own: y.token is D or 1, and 32 bits hold the offset of a tile."""
    o = s if y.token is None else s * y.token
    tl.store(p_y + o + steps(o_d, y.channel), value.to(p_y.dtype.element_ty), m_d)


@triton.jit
def put_run(y, p_y, s, stop, values, o_d, m_d, U: tl.constexpr):
    """Stores the U tokens from s on that are before `stop`."""
    o_t, run = s + tl.arange(0, U), together(values, o_d.shape[0], U).to(p_y.dtype.element_ty)
    p = p_y + steps(o_d, y.channel)[:, None] + o_t[None, :]
    if s + U <= stop:
        tl.store(p, run, m_d[:, None])
    else:
        tl.store(p, run, m_d[:, None] & (o_t < stop)[None, :])


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
    last = reach
    if dx.token is None:
        last = own + U  # the last run of them is stored behind the last token
        for _ in tl.static_range(U - (W - 1)):
            dxs = dxs + (tl.zeros([BD], tl.float32),)
    for s in range(0, last, U):
        limit = tl.minimum(reach, end)
        xs, dys = xs + fetch(x, p_x, s, limit, o_d, m_d, U), fetch(dy, p_dy, s, limit, o_d, m_d, U)
        for j in tl.static_range(U):
            now = dys[j]
            if SILU:
                now *= silu_slope(convolve(xs, taps, bias, j, W))
            g = g + (now,)
            if s + j < own:
                sums = accumulate(sums, now, xs, j, W)
            grad = tl.zeros([BD], tl.float32)
            if p_dfinal is not None:
                if s + j >= end:
                    i = s + j - end
                    grad += tl.load(p_dfinal + o_d * (W - 1) + i, within(m_d, i < W - 1), 0.0)
            for w in tl.static_range(W):
                grad = taps[w] * g[j + W - 1 - w] + grad
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


@triton.jit(do_not_specialize=("S",))
def step_kernel(
    p_x, p_weight, p_bias, p_state, p_y, x_row: tl.int64, D,
    p_rows, p_positions, S, state_b, state_d, state_s,
    SLOTS: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One token. p_rows: which of S states a row of the batch has, None: its own; p_positions: circular."""
    i_b, o_d, m_d = channels(tl.program_id(0), D, BD)
    i_b = i_b.to(tl.int64)
    p_weight += o_d * W
    i_s, there = state_of(p_rows, i_b, S)
    p_state += i_s * state_b + o_d.to(tl.int64) * state_d
    m_s = within(m_d, there)
    x = tl.load(p_x + i_b * x_row + o_d, m_d, 0.0).to(tl.float32)
    y = x * tl.load(p_weight + W - 1, m_d, 0.0).to(tl.float32)
    if p_bias is not None:
        y += tl.load(p_bias + o_d, m_d, 0.0).to(tl.float32)
    newest = SLOTS - 1
    if p_positions is None:
        OLD: tl.constexpr = SLOTS - (W - 1)  # slots that have no tap
        for s in range(0, SLOTS, U):
            past, run = (), tl.zeros([BD], tl.float32)
            for j in tl.static_range(U):
                past = past + (tl.load(p_state + (s + j) * state_s, within(m_s, s + j < SLOTS), 0.0),)
            for j in tl.static_range(U):
                w, m = s + j - OLD, within(m_s, s + j < SLOTS)
                run += past[j].to(tl.float32) * tl.load(p_weight + w, within(m, w >= 0), 0.0).to(tl.float32)
                tl.store(p_state + (s + j - 1) * state_s, past[j], within(m, s + j > 0))
            y += run
    else:
        newest = (tl.load(p_positions + i_b) % SLOTS + SLOTS) % SLOTS
        for w in range(0, W - 1, U):
            run = tl.zeros([BD], tl.float32)
            for j in tl.static_range(U):
                slot, m = newest - (W - 1) + w + j, within(m_s, w + j < W - 1)
                slot = tl.where(slot < 0, slot + SLOTS, slot)
                past = tl.load(p_state + slot * state_s, m, 0.0).to(tl.float32)
                run += past * tl.load(p_weight + w + j, m, 0.0).to(tl.float32)
            y += run
    if SLOTS > 0:
        tl.store(p_state + newest * state_s, x.to(p_state.dtype.element_ty), m_s)
    if SILU:
        y = silu(y)
    tl.store(p_y + i_b * D + o_d, of_state(y, p_rows, i_s, S).to(p_y.dtype.element_ty), m_d)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [B or N, D, W-1]."""
    if cu_seqlens is not None:
        boundaries("causal_conv1d", cu_seqlens, x.shape[1])
    given, sizes = prepare(x, weight, bias, initial_state, cu_seqlens)
    W, SILU = weight.shape[1], activation == "silu"
    y, state = empty_as(x), new_state(x, W, cu_seqlens)
    if W in UNROLLED:
        width, length, U = tile(x, AHEAD[0])
        grid = programs(x, cu_seqlens, length, width)
        forward_kernel[grid](
            tokens(x), tokens(y), given, state, *sizes, length, W, U, width, SILU, num_warps=1
        )
    else:
        width = channels_at_once(x.shape[2])
        grid = programs(x, cu_seqlens, WIDE, width)
        wide_forward_kernel[grid](tokens(x), None, tokens(y), given, state, *sizes, W, WIDE, width, SILU)
    return y, state


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (empty where it is missing) and the initial state."""
    given, sizes = prepare(x, weight, bias, initial_state, cu_seqlens)
    (_, T, D), W, SILU = x.shape, weight.shape[1], activation == "silu"
    dx, dinitial, dfinal = empty_as(x), new_state(x, W, cu_seqlens), contiguous(grad_state)
    if W in UNROLLED:
        width, length, U = tile(x, AHEAD[1])
        grid = programs(x, cu_seqlens, length, width)
        parts = x.new_empty(grid[0] // cdiv(D, width), W + 1, D, dtype=torch.float32)
        backward_kernel[grid](
            *map(tokens, (grad_y, x, dx)), given, dfinal, dinitial, parts, *sizes, length, W, U, width, SILU,
            num_warps=1,
        )  # fmt: skip
        dbias, *dtaps = parts.sum(0)
    else:
        width, g = channels_at_once(D), grad_y
        if SILU:
            g = torch.empty_like(dx, dtype=torch.float32)
            grid = programs(x, cu_seqlens, WIDE, width)
            wide_forward_kernel[grid](*map(tokens, (x, grad_y, g)), given, None, *sizes, W, WIDE, width, True)
        grid = programs(x, cu_seqlens, WIDE, width, W - 1)
        wide_inputs_kernel[grid](tokens(g), tokens(dx), given, dfinal, dinitial, *sizes, W, WIDE, width)
        grid = programs(x, cu_seqlens, T, width)
        parts = x.new_empty(grid[0] // cdiv(D, width), W, D, dtype=torch.float32)
        wide_weight_kernel[grid[0] * W,](tokens(g), tokens(x), given, parts, *sizes, W, WIDE, width)
        dbias, dtaps = g.sum((0, 1), dtype=torch.float32), parts.sum(0).unbind()
    dweight = torch.stack(dtaps, 1).to(weight.dtype)
    dbias = dbias.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return dx, dweight, dbias, dinitial


takes = all_as_they_are


def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    state_indices: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """y [B, D]; `state` is updated in place."""
    (B, D), W, (S, _, slots) = x.shape, weight.shape[1], state.shape
    x, weight, bias = along_rows(x), weight.contiguous(), contiguous(bias)
    y = x.new_empty(x.shape)
    width = channels_at_once(D)
    grid = (B * cdiv(D, width),)
    at_once = min(max(slots if positions is None else W - 1, 1), 16)
    step_kernel[grid](
        x, weight, bias, state, y, x.stride(0), D, contiguous(state_indices), contiguous(positions), S,
        *state.stride(), slots, W, at_once, width, activation == "silu",
    )  # fmt: skip
    return y


def prepare(x, weight, bias, initial_state, cu_seqlens) -> tuple[Filter, tuple[int, int, int]]:
    """What every kernel reads besides x, and T, D, N."""
    N = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Filter(*map(contiguous, (weight, bias, initial_state, cu_seqlens))), (*x.shape[1:], N)


def programs(x, cu_seqlens, length: int, width: int, before: int = 0) -> tuple[int]:
    """How many: see `locate`."""
    B, T, D = x.shape
    count = B * cdiv(T + before, length)
    if cu_seqlens is not None:
        N = cu_seqlens.shape[0] - 1
        count = (T + N * before) // length + N
    return (count * cdiv(D, width),)


def new_state(x, W: int, cu_seqlens) -> Tensor:
    S = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(S, x.shape[2], W - 1, dtype=torch.float32)
