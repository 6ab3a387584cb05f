"""The causal convolution in Triton. A program walks tokens of one sequence, the window of W in registers.

    i_  index of a tile     o_  offsets (tl.arange)     m_  mask     p_  pointers

Filters of 2 to 4 taps have them unrolled. The kernels called wide take any number: they loop over the taps.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import along_rows, boundaries, contiguous
from ..curves import of_state, silu, silu_slope, state_of, within
from ..launch import cdiv, power_of_2

UNROLLED = (2, 3, 4)  # taps
AHEAD = 8, 4  # tokens that a lane loads at once, forward and backward: 71 and 128 registers for 4 taps
BD = 128  # channels at most: 4 a lane
WIDE = 16  # tokens of a wide kernel's tile
RUN = tl.constexpr(16)  # taps added up before they join the others: hundreds lose fewer roundings


def tile(D: int, tokens: int) -> tuple[int, int]:
    """Channels and tokens of a program: 16 tokens, or as many as leave 4096 programs: 132 processors twice.

    The longer, the less is read twice (W-1 tokens on each side) and the fewer parts of the weight's gradient.
    """
    width, length = channels_at_once(D), 256
    while length > 16 and cdiv(tokens, length) * cdiv(D, width) < 4096:
        length //= 2
    return width, length


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
def filters(p_weight, p_bias, o_d, m_d, W: tl.constexpr):
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(p_weight + o_d * W + w, m_d, 0.0).to(tl.float32),)
    bias = tl.zeros([o_d.shape[0]], tl.float32)
    if p_bias is not None:
        bias += tl.load(p_bias + o_d, m_d, 0.0).to(tl.float32)
    return taps, bias


@triton.jit
def token(p_x, p_initial, x_token, s, begin, end, o_d, m_d, W):
    """Token s of a sequence, or of the state before it."""
    x = tl.load(p_x + s * x_token + o_d, within(m_d, (begin <= s) & (end > s)), 0.0).to(tl.float32)
    if p_initial is not None:
        i = W - 1 - begin + s
        x += tl.load(p_initial + o_d * (W - 1) + i, within(m_d, (i >= 0) & (begin > s)), 0.0)
    return x


@triton.jit
def convolve(x, taps, bias, j: tl.constexpr, W: tl.constexpr):
    for w in tl.static_range(W):
        bias = x[j + w] * taps[w] + bias
    return bias


@triton.jit
def forward_kernel(
    p_x, p_weight, p_bias, p_initial, p_cu, p_y, p_final, x_row: tl.int64, x_token: tl.int64, T, D, N, BT,
    W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    row, n, t, begin, own, end = locate(i_t, p_cu, T, N, BT, 0)
    p_x += row * x_row + t * x_token
    p_y += (row * T + t) * D
    p_final += n * D * (W - 1)
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    taps, bias = filters(p_weight, p_bias, o_d, m_d, W)
    x = ()
    for w in tl.static_range(W - 1):
        x = x + (token(p_x, p_initial, x_token, w - (W - 1), begin, end, o_d, m_d, W),)
    if (own == end) & ((own > 0) | (begin == 0)):
        for w in tl.static_range(W - 1):
            last = token(p_x, p_initial, x_token, end - (W - 1) + w, begin, end, o_d, m_d, W)
            tl.store(p_final + o_d * (W - 1) + w, last, m_d)
    for s in range(0, own, U):
        for j in tl.static_range(U):
            x = x + (tl.load(p_x + (s + j) * x_token + o_d, within(m_d, s + j < own), 0.0).to(tl.float32),)
        for j in tl.static_range(U):
            y = convolve(x, taps, bias, j, W)
            if SILU:
                y = silu(y)
            tl.store(p_y + (s + j) * D + o_d, y.to(p_y.dtype.element_ty), within(m_d, s + j < own))
        x = x[U:]


@triton.jit
def accumulate(sums, g, x, j: tl.constexpr, W: tl.constexpr):
    out = (sums[0] + g,)
    for w in tl.static_range(W):
        out = out + (g * x[j + w] + sums[w + 1],)
    return out


@triton.jit
def backward_kernel(
    p_dy, p_dfinal, p_x, p_weight, p_bias, p_initial, p_cu, p_dx, p_sums, p_dinitial,
    x_row: tl.int64, x_token: tl.int64, T, D, N, BT,
    W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Token s brings the gradient g before its activation; with it that of token s-(W-1) is complete."""
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    row, n, t, begin, own, end = locate(i_t, p_cu, T, N, BT, 0)
    p_x += row * x_row + t * x_token
    p_dy += (row * T + t) * D
    p_dx += (row * T + t - (W - 1)) * D
    p_dinitial += n * D * (W - 1)
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    if p_dfinal is not None:
        p_dfinal += n * D * (W - 1)
    taps, bias = filters(p_weight, p_bias, o_d, m_d, W)
    x, g, sums = (), (), (tl.zeros([BD], tl.float32),)  # sums: of the bias, then of the taps
    for w in tl.static_range(W - 1):
        x = x + (token(p_x, p_initial, x_token, w - (W - 1), begin, end, o_d, m_d, W),)
        g = g + (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([BD], tl.float32),)
    reach = own + W - 1
    for s in range(0, reach, U):
        dy = ()
        for j in tl.static_range(U):
            m = within(m_d, s + j < tl.minimum(reach, end))
            x = x + (tl.load(p_x + (s + j) * x_token + o_d, m, 0.0).to(tl.float32),)
            dy = dy + (tl.load(p_dy + (s + j) * D + o_d, m, 0.0).to(tl.float32),)
        for j in tl.static_range(U):
            now = dy[j]
            if SILU:
                now *= silu_slope(convolve(x, taps, bias, j, W))
            g = g + (now,)
            if s + j < own:
                sums = accumulate(sums, now, x, j, W)
            dx = tl.zeros([BD], tl.float32)
            if p_dfinal is not None:
                if s + j >= end:
                    i = s + j - end
                    dx += tl.load(p_dfinal + o_d * (W - 1) + i, within(m_d, i < W - 1), 0.0)
            for w in tl.static_range(W):
                dx = taps[w] * g[j + W - 1 - w] + dx
            if s + j >= W - 1:
                tl.store(p_dx + (s + j) * D + o_d, dx.to(p_dx.dtype.element_ty), within(m_d, s + j < reach))
            elif begin == 0:
                tl.store(p_dinitial + o_d * (W - 1) + s + j, dx, m_d)
        x = x[U:]
        g = g[U:]
    p_sums += i_t.to(tl.int64) * D * (W + 1)
    for w in tl.static_range(W + 1):
        tl.store(p_sums + w * D + o_d, sums[w], m_d)


@triton.jit
def wide_forward_kernel(
    p_x, p_weight, p_bias, p_initial, p_cu, p_dy, p_y, p_final,
    x_row: tl.int64, x_token: tl.int64, T, D, N, W,
    BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y and the final state; given dy, the gradient before the activation in y's place."""
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    o_d, m_d, o_t = o_d[None, :], m_d[None, :], tl.arange(0, BT)[:, None]
    row, n, t, begin, own, end = locate(i_t, p_cu, T, N, BT, 0)
    p_x += row * x_row + t * x_token
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    if p_final is not None:
        if (own == end) & ((own > 0) | (begin == 0)):
            for w in range(0, W - 1, BT):
                i = w + o_t
                last = token(p_x, p_initial, x_token, end - (W - 1) + i, begin, end, o_d, m_d, W)
                tl.store(p_final + n * D * (W - 1) + o_d * (W - 1) + i, last, m_d & (i < W - 1))
    y = tl.zeros([BT, BD], tl.float32)
    if p_bias is not None:
        y += tl.load(p_bias + o_d, m_d, 0.0).to(tl.float32)
    for first in range(0, W, RUN):
        run = tl.zeros([BT, BD], tl.float32)
        for w in range(first, tl.minimum(first + RUN, W)):
            tap = tl.load(p_weight + o_d * W + w, m_d, 0.0).to(tl.float32)
            run += token(p_x, p_initial, x_token, o_t + w - (W - 1), begin, end, o_d, m_d, W) * tap
        y += run
    o, m = (row * T + t) * D + o_t * D + o_d, m_d & (o_t < own)
    if p_dy is not None:
        y = tl.load(p_dy + o, m, 0.0).to(tl.float32) * silu_slope(y)
    elif SILU:
        y = silu(y)
    tl.store(p_y + o, y.to(p_y.dtype.element_ty), m)


@triton.jit
def wide_inputs_kernel(
    p_g, p_dfinal, p_weight, p_cu, p_dx, p_dinitial, T, D, N, W, BT: tl.constexpr, BD: tl.constexpr
):
    """The gradients of the tokens and of the state before them, from those before the activation."""
    i_t, o_d, m_d = channels(tl.program_id(0), D, BD)
    o_d, m_d, o_t = o_d[None, :], m_d[None, :], tl.arange(0, BT)[:, None]
    row, n, t, begin, own, end = locate(i_t, p_cu, T, N, BT, W - 1)
    p_g += (row * T + t) * D
    dx = tl.zeros([BT, BD], tl.float32)
    if p_dfinal is not None:
        i = o_t - end + W - 1
        dx += tl.load(p_dfinal + n * D * (W - 1) + o_d * (W - 1) + i, m_d & (i >= 0) & (o_t < own), 0.0)
    for first in range(0, W, RUN):
        run = tl.zeros([BT, BD], tl.float32)
        for w in range(first, tl.minimum(first + RUN, W)):
            s = o_t + W - 1 - w
            g = tl.load(p_g + s * D + o_d, m_d & (s >= begin) & (s < end), 0.0).to(tl.float32)
            run += g * tl.load(p_weight + o_d * W + w, m_d, 0.0).to(tl.float32)
        dx += run
    m = m_d & (o_t < own)
    tl.store(p_dx + (row * T + t) * D + o_t * D + o_d, dx.to(p_dx.dtype.element_ty), m & (o_t >= begin))
    i = o_t - begin + W - 1
    tl.store(p_dinitial + n * D * (W - 1) + o_d * (W - 1) + i, dx, m & (o_t < begin))


@triton.jit
def wide_weight_kernel(
    p_g, p_x, p_initial, p_cu, p_sums, x_row: tl.int64, x_token: tl.int64, T, D, N, W,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of one tap, summed over a sequence."""
    i, o_d, m_d = channels(tl.program_id(0), D, BD)
    i_t, w = i // W, i % W
    p_sums += i.to(tl.int64) * D + o_d
    m_sums = m_d
    o_d, m_d, o_t = o_d[None, :], m_d[None, :], tl.arange(0, BT)[:, None]
    row, n, t, begin, own, end = locate(i_t, p_cu, T, N, T, 0)
    p_x += row * x_row + t * x_token
    p_g += (row * T + t) * D
    if p_initial is not None:
        p_initial += n * D * (W - 1)
    sums = tl.zeros([BT, BD], tl.float32)
    for first in range(0, own, BT):
        s = first + o_t
        m = m_d & (s < own)
        g = tl.load(p_g + s.to(tl.int64) * D + o_d, m, 0.0).to(tl.float32)
        sums += g * token(p_x, p_initial, x_token, s + w - (W - 1), begin, end, o_d, m, W)
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
    inputs, sizes = prepare(x, weight, bias, initial_state, cu_seqlens)
    (B, T, D), W, SILU = x.shape, weight.shape[1], activation == "silu"
    y, state = x.new_empty(x.shape), new_state(x, W, cu_seqlens)
    if W in UNROLLED:
        width, length = tile(D, B * T)
        grid = programs(x, cu_seqlens, length, width)
        forward_kernel[grid](*inputs, y, state, *sizes, length, W, AHEAD[0], width, SILU, num_warps=1)
    else:
        width = channels_at_once(D)
        grid = programs(x, cu_seqlens, WIDE, width)
        wide_forward_kernel[grid](*inputs, None, y, state, *sizes, W, WIDE, width, SILU)
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
    inputs, sizes = prepare(x, weight, bias, initial_state, cu_seqlens)
    (B, T, D), W, SILU = x.shape, weight.shape[1], activation == "silu"
    dy, dfinal = grad_y.contiguous(), contiguous(grad_state)
    dx, dinitial = x.new_empty(x.shape), new_state(x, W, cu_seqlens)
    if W in UNROLLED:
        width, length = tile(D, B * T)
        grid = programs(x, cu_seqlens, length, width)
        parts = x.new_empty(grid[0] // cdiv(D, width), W + 1, D, dtype=torch.float32)
        outputs = dx, parts, dinitial
        backward_kernel[grid](
            dy, dfinal, *inputs, *outputs, *sizes, length, W, AHEAD[1], width, SILU, num_warps=1
        )
        dbias, *dtaps = parts.sum(0)
    else:
        x, weight, _, initial_state, cu_seqlens = inputs
        width = channels_at_once(D)
        g = dy
        if SILU:
            g = x.new_empty(x.shape, dtype=torch.float32)
            grid = programs(x, cu_seqlens, WIDE, width)
            wide_forward_kernel[grid](*inputs, dy, g, None, *sizes, W, WIDE, width, True)
        grid = programs(x, cu_seqlens, WIDE, width, W - 1)
        wide_inputs_kernel[grid](g, dfinal, weight, cu_seqlens, dx, dinitial, *sizes[2:], W, WIDE, width)
        grid = programs(x, cu_seqlens, T, width)
        parts = x.new_empty(grid[0] // cdiv(D, width), W, D, dtype=torch.float32)
        wide_weight_kernel[grid[0] * W,](g, x, initial_state, cu_seqlens, parts, *sizes, W, WIDE, width)
        dbias, dtaps = g.sum((0, 1), dtype=torch.float32), parts.sum(0).unbind()
    dweight = torch.stack(dtaps, 1).to(weight.dtype)
    dbias = dbias.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return dx, dweight, dbias, dinitial


def takes(state: Tensor, dtype: torch.dtype) -> bool:
    """States of every dtype and any strides."""
    return True


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


def prepare(x, weight, bias, initial_state, cu_seqlens) -> tuple[tuple, tuple]:
    """What every kernel reads, and the sizes of it."""
    x, (_, T, D) = along_rows(x), x.shape
    N = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tensors = x, weight.contiguous(), contiguous(bias), contiguous(initial_state), contiguous(cu_seqlens)
    return tensors, (*x.stride()[:2], T, D, N)


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
