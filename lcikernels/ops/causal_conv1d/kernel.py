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

from ..checks import along_rows, boundaries, channels_first, contiguous, empty_as, looked_at
from ..curves import of_state, silu, state_of, within
from ..launch import cdiv, power_of_2
from ..states import all_as_they_are
from ..views import tokens
from .tiles import Filter, channels
from .unrolled import backward_kernel, forward_kernel
from .wide import wide_forward_kernel, wide_inputs_kernel, wide_weight_kernel

UNROLLED = (2, 3, 4)  # taps
AHEAD = 8, 4  # tokens that a lane loads at once, forward and backward: 71 and 128 registers for 4 taps
BD = 128  # channels at most: 4 a lane
RUN_OF_TOKENS = 16, 32  # tokens and channels at most, where tokens lie beside each other: 1 a lane
WIDE = 16  # tokens of a wide kernel's tile


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


def channels_at_once(D: int) -> int:
    return min(BD, power_of_2(D))


class Window(NamedTuple):
    """The states of a step [S, D, SLOTS], elements from one index to the next; which of them a row of the
    batch has, None: its own; the circular ones' positions."""

    p: Tensor
    row: int
    channel: int
    slot: int
    rows: Tensor | None
    positions: Tensor | None


@triton.jit(do_not_specialize=("S",))
def step_kernel(
    p_x, p_y, given, state, x_row: tl.int64, D, S,
    SLOTS: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One token."""
    i_b, o_d, m_d = channels(tl.program_id(0), D, BD)
    i_b = i_b.to(tl.int64)
    p_weight, state_s = given.weight + o_d * W, state.slot
    i_s, there = state_of(state.rows, i_b, S)
    p_state = state.p + i_s * state.row + o_d.to(tl.int64) * state.channel
    m_s = within(m_d, there)
    x = tl.load(p_x + i_b * x_row + o_d, m_d, 0.0).to(tl.float32)
    y = x * tl.load(p_weight + W - 1, m_d, 0.0).to(tl.float32)
    if given.bias is not None:
        y += tl.load(given.bias + o_d, m_d, 0.0).to(tl.float32)
    newest = SLOTS - 1
    if state.positions is None:
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
        newest = (tl.load(state.positions + i_b) % SLOTS + SLOTS) % SLOTS
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
    tl.store(p_y + i_b * D + o_d, of_state(y, state.rows, i_s, S).to(p_y.dtype.element_ty), m_d)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [B or N, D, W-1]."""
    if cu_seqlens is not None and looked_at(cu_seqlens):
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
    x, y = along_rows(x), x.new_empty(x.shape)
    given = Filter(weight.contiguous(), contiguous(bias), None, None)
    window = Window(state, *state.stride(), contiguous(state_indices), contiguous(positions))
    width = channels_at_once(D)
    grid = (B * cdiv(D, width),)
    at_once = min(max(slots if positions is None else W - 1, 1), 16)
    step_kernel[grid](x, y, given, window, x.stride(0), D, S, slots, W, at_once, width, activation == "silu")
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
