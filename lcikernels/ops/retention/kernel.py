"""Retention in Triton, chunk by chunk, a program's state in its registers. Nothing is saved for the backward.

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers

The output and three gradients are one recurrence in four roles:

    S[t] = decay[t] S[t-1] + y[t] (x) z[t]          out[t] = x[t] . S[t]
    o:   x = q,  y = k,  z = v                      dq:  x = do, y = v,  z = k      forward in time
    dv:  x = k,  y = q,  z = do                     dk:  x = v,  y = do, z = q      backward

In a chunk of C tokens that is products of matrices. With A the running sum of log_decay in the chunk and S
the state that enters it (backward in time: the gradient of the one that leaves, with P transposed and the two
decays exchanged):

    P = (x y^T) * exp(A[t] - A[s]) for s <= t       out = P z + exp(A) x . S
    S <- exp(A[end]) S + y^T (exp(A[end] - A) z)

`scores_kernel` finds the P that o and dv share, the one of dq and dk, and the decays, of all chunks at once.
A program of `walk_kernel` owns BZ columns of one head's state in one segment of a sequence, and walks its
chunks with S^T in registers: a tensor core takes it from there. A segment is a whole sequence where that
fills the GPU, and a chunk where the gradient of log_decay asks for all states; else as many tokens as fill
it. Where it is a part of its sequence, a walk without output finds what each adds to the state, and
`chain_kernel` joins these. So the last bits depend on the number of multiprocessors; two runs on one GPU are
equal. Where heads share q, k or v, gradients are made for each head and then summed.

Sequence n of a packed row has the segments from cu[n] // L + n on, of L tokens: never too few, some without
tokens.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton import language as tl

from ..checks import boundaries, contiguous, refuse
from ..curves import LOG2E, of_state, state_of, within
from ..launch import cdiv, device, options, power_of_2
from ..states import all_as_they_are
from ..views import line, steps, tokens
from .scores import LEAST, Heads, Scores, Scoring, scores_kernel
from .walk import Ends, Roles, Walking, chain_kernel, rate_kernel, walk_kernel

MOST = 512  # rows or columns of a state
CUT = 256  # tokens: segments are multiples of it
SHORT = 16  # tokens: not more go one by one, instead of a chunk's products of 64
BLOCK = 1024  # elements of a state that chain_kernel carries


@triton.jit
def vector(x, i_b, t, i_h, o, m):
    """Elements o of a token and head of x, a Tokens."""
    p = x.p + steps(i_b, x.row) + steps(t, x.token) + steps(i_h, x.group)
    return tl.load(p + steps(o, x.channel), m, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=("T", "Hq", "Hk", "Hv", "H", "rate_row", "S"))
def recurrent_kernel(
    q, k, v, p_rate, p_enter, p_leave, p_o, rate_row, scale, T, Hq, Hk, Hv, H, K, V,
    p_rows, S, state_b, state_h, state_k, state_v,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Token by token, with all rows and BV columns of a state. rate_row: 0 where all tokens have one rate.

    p_rows: which of S states, of these strides, a row of the batch has; None: its own.
    """
    tiles = tl.cdiv(V, BV)
    i_v, i_h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    i_b = (tl.program_id(0) // tiles // H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    i_s, there = state_of(p_rows, i_b, S)
    o_state = (o_k.to(tl.int64) * state_k)[:, None] + (o_v.to(tl.int64) * state_v)[None, :]
    o_state += i_s * state_b + i_h.to(tl.int64) * state_h
    m_state = within(m_k[:, None] & m_v[None, :], there)
    state = tl.zeros([BK, BV], tl.float32)
    if p_enter is not None:
        state += tl.load(p_enter + o_state, m_state, 0.0).to(tl.float32)
    for t in range(T):
        row = i_b * T + t
        b_q = vector(q, i_b, t, i_h // (H // Hq), o_k, m_k)
        b_k = vector(k, i_b, t, i_h // (H // Hk), o_k, m_k)
        b_v = vector(v, i_b, t, i_h // (H // Hv), o_v, m_v)
        decay = tl.math.exp2(tl.load(p_rate + row * rate_row + i_h) * LOG2E)
        state = state * decay + b_k[:, None] * b_v[None, :]
        o = of_state(tl.sum(b_q[:, None] * state, 0) * scale, p_rows, i_s, S)
        tl.store(p_o + (row * H + i_h) * V + o_v, o.to(p_o.dtype.element_ty), m_v)
    tl.store(p_leave + o_state, state.to(p_leave.dtype.element_ty), m_state)


class Walk(NamedTuple):
    """Tiles of a state, how many a program has, its warps."""

    BX: int
    BZ: int
    TILES: int
    warps: int


@cache
def tiles(X: int, Z: int, dtype: torch.dtype) -> Walk:
    """64 columns for 4 warps, a warp group: S^T is multiplied from the registers it is summed in.

    A thread has 128 elements of it, 64 in float32: more would spill.
    """
    BX, BZ = (max(16, min(most, power_of_2(size))) for size, most in ((X, 64), (Z, 128)))
    warps = 8 if BZ == 128 else 4
    rows = 32 * warps if dtype != torch.float32 else 16 * warps
    return Walk(BX, BZ, cdiv(min(X, rows), BX), warps)


def chunk(dtype: torch.dtype, sm: int) -> int:
    """Its tokens. A Hopper multiplies 64 at least; with them a GPU before would spill, with 32 float32."""
    if dtype == torch.float32:
        return 16
    return 64 if dtype == torch.bfloat16 and sm >= 90 else 32


def segment(T: int, rows: int, N: int, walks: int, multiprocessors: int) -> int:
    """The tokens of a segment: more than T where `walks` of each of N sequences fill the GPU.

    Packed sequences are taken to be of one length: to know would wait for the device.
    """
    if N * walks >= multiprocessors:
        return T + 1
    L = cdiv(rows * T * walks, 2 * multiprocessors * CUT) * CUT
    return L if L < T else T + 1


class Problem:
    """The inputs as the kernels take them, and how they are cut."""

    def __init__(self, q, k, v, log_decay, scale, cu_seqlens, need_log_decay=False):
        self.q, self.k, self.v = q, k, v
        self.rate, self.cu_seqlens = contiguous(log_decay), contiguous(cu_seqlens)
        self.B, self.T, _, self.K = q.shape
        self.V, self.scale, self.heads = v.shape[3], scale, [u.shape[2] for u in (q, k, v)]
        self.H = max(self.heads)
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        multiprocessors, sm = device(q)
        self.C = chunk(q.dtype, sm)
        self.precision = "tf32" if q.dtype == torch.float16 and sm else "ieee"
        walks = self.H * cdiv(self.V, tiles(self.K, self.V, q.dtype).BZ)
        whole = segment(self.T, self.B, self.N, walks, multiprocessors)
        self.L = self.C if need_log_decay else whole
        self.cut = need_log_decay or self.L <= self.T
        self.S, self.segments = self.pieces(self.L)

    def pieces(self, L: int) -> tuple[int, int]:
        """How many of L tokens a row has, and all."""
        S = cdiv(self.T, L)
        return S, self.B * S if self.cu_seqlens is None else self.T // L + self.N

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def of_all_heads(self, u: Tensor) -> Tensor:
        """Memory for a gradient of u, for each head that reads it."""
        return u.new_empty(self.B, self.T, self.H, u.shape[3])

    def score(self, q: Heads, k: Heads, v: Heads, do: Heads | None = None, drate=None) -> None:
        """P, its gradient, the decays."""
        B, T, H, C = self.B, self.T, self.H, self.C
        P = self.empty(B, T, H, C, dtype=kept(self.q.dtype))
        dP = None if do is None else torch.empty_like(P)
        self.scores = Scores(P, dP, self.empty(B, T, H), self.empty(B, T, H), drate)
        S, chunks = self.pieces(C)
        BK, BV = (max(16, min(64, power_of_2(X))) for X in (self.K, self.V))
        fixed = Scoring(H, self.K, self.V, self.rate.dim() == 3, C, BK, BV, self.precision)
        scores_kernel[(chunks * H,)](
            q, k, v, do, self.scores, self.rate, self.cu_seqlens, self.scale, T, self.N, S, fixed,
            **options(4),
        )  # fmt: skip

    def decays(self) -> None:
        """What `score` finds beside P, alone."""
        rate = self.rate.clamp(min=LEAST.value).double().expand(self.B, self.T, self.H)
        A = pad(rate, (0, 0, 0, -self.T % self.C)).unflatten(1, (-1, self.C)).cumsum(2)
        since, until = (
            u.exp().flatten(1, 2)[:, : self.T].float().contiguous() for u in (A, A[:, :, -1:] - A)
        )
        self.scores = Scores(None, None, since, until, None)

    def walk(self, roles: Roles, scores: Scores, ends: Ends, reverse: bool, swapped: bool = False) -> Tensor:
        """out. Rows that a program has no room for are walked after the others, and add to it.

        swapped: rows are V's.
        """
        X, Z = roles.y.p.shape[2], roles.z.p.shape[2]
        t = tiles(X, Z, roles.y.p.dtype)
        columns, tiles_x, at_once = cdiv(Z, t.BZ), cdiv(X, t.BX), t.TILES
        programs = columns * self.segments * self.H
        if ends.out is None:
            programs, tiles_x, at_once = programs * tiles_x, 1, 1
        DOTS = 0 if ends.dots is None else ends.dots.shape[3]
        for first in range(0, tiles_x, at_once):
            fixed = Walking(
                self.H, X, Z, *((1, X) if swapped else (Z, 1)), first * t.BX, DOTS, reverse,
                self.C, t.BX, t.BZ, min(at_once, tiles_x - first), self.precision,
            )  # fmt: skip
            walk_kernel[(programs,)](
                roles, scores, ends, self.cu_seqlens, self.scale, self.T, self.N, self.S, self.L, fixed,
                **options(t.warps), num_stages=1,
            )  # fmt: skip
            if ends.dots is not None:
                ends = ends._replace(dots=ends.dots[..., columns:])
        return ends.out

    def between_segments(self, y, z, reverse, enter, leave=None, others=None, crossing=None) -> Tensor:
        """The states that enter the segments [segments, H, K, V], found without walking them one by one."""
        states = self.empty(self.segments, self.H, self.K, self.V, dtype=kept(self.q.dtype))
        faded = self.empty(self.segments, self.H)
        ends = Ends(None, None, None, states, faded)
        self.walk(Roles(None, y, z, None), self.scores, ends, reverse)
        KV = self.K * self.V
        chain_kernel[(cdiv(KV, BLOCK) * self.H * self.N,)](
            states, faded, enter, leave, self.cu_seqlens, others, crossing,
            self.S, self.L, self.H, KV, reverse, BLOCK, **options(4),
        )  # fmt: skip
        return states


def heads(x: Tensor) -> Heads:
    """x [B, T, heads, X] as kernels take it: a view where tokens are equally far apart, else a copy."""
    rows = line(x)
    _, count, X = rows.shape
    return Heads(rows, *map(tl.constexpr, (count, rows.stride(0), X if count == 1 else rows.stride(1))))


def check(q: Tensor, v: Tensor) -> None:
    for name, axis, size in (("q", "K", q.shape[3]), ("v", "V", v.shape[3])):
        if size > MOST:
            refuse("retention", name, f"[B, T, H, {axis}] with {axis} at most {MOST}", size)


def kept(dtype: torch.dtype) -> torch.dtype:
    """Of P and the states between segments: products with bfloat16 round them anyway; float16 has no room."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the final state [B or N, H, K, V]."""
    if cu_seqlens is not None:
        boundaries("retention", cu_seqlens, q.shape[1])
    check(q, v)
    p = Problem(q, k, v, log_decay, scale, cu_seqlens)
    enter = contiguous(initial_state)
    o, final = p.empty(p.B, p.T, p.H, p.V, dtype=v.dtype), p.empty(p.N, p.H, p.K, p.V)
    if p.T <= SHORT and cu_seqlens is None:
        recurrent(p, enter, final, o)
        return o, final
    q, k, v = map(heads, (q, k, v))
    p.score(q, k, v)
    if p.cut:
        enter = p.between_segments(k, v, False, enter, final)
    p.walk(Roles(q, k, v, None), p.scores, Ends(enter, o, None, None if p.cut else final, None), False)
    return o, final


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (zeros [1] where it is not needed) and the initial state."""
    check(q, v)
    p = Problem(q, k, v, log_decay, scale, cu_seqlens, need_log_decay)
    of_q, of_k, of_v, of_do = map(heads, (q, k, v, grad_o))
    enter, end = contiguous(initial_state), contiguous(grad_state)
    dinitial = p.empty(p.N, p.H, p.K, p.V)
    drate, crossing, out_of, into = None, None, None, None
    if need_log_decay:
        t = tiles(p.V, p.K, v.dtype)
        tiles_k = cdiv(p.K, t.BZ) * cdiv(p.V, t.BX * t.TILES)
        drate, crossing = p.empty(p.B, p.T, p.H), p.empty(p.segments, p.H, cdiv(p.K * p.V, BLOCK))
        out_of, into = (p.empty(p.B, p.T, p.H, tiles_k) for _ in "qk")
    p.score(of_q, of_k, of_v, of_do, drate)
    if p.cut:
        enter = p.between_segments(of_k, of_v, False, enter)
        end = p.between_segments(of_q, of_do, True, end, dinitial, enter, crossing)
    of_dP = p.scores._replace(P=p.scores.dP)
    ends = Ends(enter, p.of_all_heads(q), out_of, None, None)
    dq = shared(p.walk(Roles(of_do, of_v, of_k, of_q), of_dP, ends, False, True), q)
    ends = Ends(end, p.of_all_heads(k), into, None, None)
    dk = shared(p.walk(Roles(of_v, of_do, of_q, of_k), of_dP, ends, True, True), k)
    ends = Ends(end, p.of_all_heads(v), None, None if p.cut else dinitial, None)
    dv = shared(p.walk(Roles(of_k, of_q, of_do, None), p.scores, ends, True), v)
    if drate is None:
        return dq, dk, dv, dinitial.new_zeros(1), dinitial
    rate_kernel[(p.segments * p.H,)](
        p.cu_seqlens, out_of, into, crossing, drate, p.T, p.N, p.S, p.H, tiles_k, crossing.shape[2], p.C,
        **options(4),
    )  # fmt: skip
    drate = drate.sum((0, 1)) if log_decay.dim() == 1 else drate
    return dq, dk, dv, drate, dinitial


def crossing(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What all tokens add to the state that enters them, [B, H, K, V]."""
    return crossed(k, v, log_decay, 1.0, False)


def crossing_back(q: Tensor, grad_o: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """What they add to the gradient of that state, [B, H, K, V]."""
    return crossed(q, grad_o, log_decay, scale, True)


def crossed(y: Tensor, z: Tensor, log_decay: Tensor, scale: float, reverse: bool) -> Tensor:
    """The state behind all of y (x) z, from one end to the other."""
    check(y, z)
    H = log_decay.shape[-1]
    z = z if H in (y.shape[2], z.shape[2]) else z.repeat_interleave(H // z.shape[2], 2)
    p = Problem(y, y, z, log_decay, scale, None)
    p.decays()
    state, y, z = p.empty(p.B, p.H, p.K, p.V), heads(y), heads(z)
    if p.cut:
        p.between_segments(y, z, reverse, None, state)
    else:
        p.walk(Roles(None, y, z, None), p.scores, Ends(None, None, None, state, None), reverse)
    return state


def shared(grad: Tensor, u: Tensor) -> Tensor:
    """The gradient of u, summed over the heads that share one of u's."""
    return grad if grad.shape == u.shape else grad.unflatten(2, (u.shape[2], -1)).sum(3)


def recurrent(
    p: Problem, enter: Tensor | None, leave: Tensor, o: Tensor, state_indices: Tensor | None = None
) -> None:
    """Fill o and `leave`, which lies as `enter` or is `enter`."""
    BK = max(16, power_of_2(p.K))
    BV = max(1, min(32, MOST * 32 // BK, power_of_2(p.V)))
    rate_row = p.H if p.rate.dim() > 1 else 0
    recurrent_kernel[(p.B * p.H * cdiv(p.V, BV),)](
        *map(tokens, (p.q, p.k, p.v)), p.rate, enter, leave, o, rate_row, p.scale, p.T,
        *p.heads, p.H, p.K, p.V, state_indices, len(leave), *leave.stride(), BK, BV,
        **options(min(8, max(1, BK * BV // 1024))),
    )  # fmt: skip


takes = all_as_they_are


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
) -> Tensor:
    """o [B, H, V]; `state` is updated in place."""
    per_token = log_decay.dim() == 2
    p = Problem(*(u[:, None] for u in (q, k, v)), log_decay[:, None] if per_token else log_decay, scale, None)
    o = v.new_empty(p.B, 1, p.H, p.V)
    recurrent(p, state, state, o, contiguous(state_indices))
    return o[:, 0]
