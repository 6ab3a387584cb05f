"""How a problem is cut among programs, and the launch of each kernel of retention."""

from math import gcd, lcm
from typing import NamedTuple

import torch
from torch import Tensor
from triton import language as tl

from ..checks import contiguous, refuse
from ..launch import cdiv, device, name, options, power_of_2
from ..views import tokens
from .chunks import Cut, Heads, constant, describable, described, heads
from .crossing import Added, Crossing, chain_kernel, crossing_kernel
from .fused import Fused, fused_kernel
from .gradients import Gradients, Grads, Outer, gradients_kernel
from .rates import Rating, Weighed, rate_kernel, small_rate_kernel
from .recurrent import Cache, Counts, Inputs, recurrent_kernel
from .scores import Pairs, Scores, Scoring, scores_kernel
from .tiles import BLOCK, CUT, MOST, SMALL, Tile, chosen, chunk
from .walk import Decays, Ends, Roles, Walking, walk_kernel


class Part(NamedTuple):
    """One of the recurrences that share a problem: x, y, z, w as `Roles` has them; the states that it starts
    from and leaves; backward in time or not; whether a row of its state is a column in memory."""

    x: Tensor
    y: Tensor
    z: Tensor
    w: Tensor | None
    enter: Tensor | None
    leave: Tensor | None
    reverse: bool
    swapped: bool

    @property
    def sizes(self) -> tuple[int, int]:
        return self.y.shape[3], self.z.shape[3]

    @property
    def steps(self) -> tuple[int, int]:
        """From row to row, from column to column."""
        X, Z = self.sizes
        return (1, X) if self.swapped else (Z, 1)


def segment(T: int, rows: int, N: int, walks: int, multiprocessors: int) -> int:
    """The tokens of a segment: more than T where `walks` of each of N sequences fill the GPU.

    Packed sequences are taken to be of one length: to know would wait for the device.
    """
    if N * walks >= multiprocessors:
        return T + 1
    L = cdiv(rows * T * walks, 2 * multiprocessors * CUT) * CUT
    return L if L < T else T + 1


def kept(dtype: torch.dtype) -> torch.dtype:
    """Of P and the states between segments: products with bfloat16 round them anyway; float16 has no room."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def narrow(dtype: torch.dtype) -> tl.dtype:
    """What kernels multiply."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def check(q: Tensor, v: Tensor) -> None:
    for argument, axis, size in (("q", "K", q.shape[3]), ("v", "V", v.shape[3])):
        if size > MOST:
            refuse("retention", argument, f"[B, T, H, {axis}] with {axis} at most {MOST}", size)


def small(q: Tensor, v: Tensor) -> bool:
    """Whether a state is one tile."""
    return max(q.shape[3], v.shape[3]) <= SMALL


def at_once(q: Tensor, v: Tensor) -> bool:
    """Whether a program has room for all gradients of a chunk: 128 float16 spill 560 bytes, 64 float32 8."""
    most = {torch.bfloat16: SMALL, torch.float16: SMALL // 2, torch.float32: SMALL // 4}[q.dtype]
    return max(q.shape[3], v.shape[3]) <= most


class Problem:
    """The inputs as the kernels take them, and how they are cut.

    by_chunks: every chunk is a segment, so that all states are in memory.
    """

    def __init__(self, q, k, v, log_decay, scale, cu_seqlens, by_chunks=False):
        check(q, v)
        self.rates, self.cu_seqlens, self.scale = contiguous(log_decay), contiguous(cu_seqlens), scale
        self.q, self.dtype, self.H = q, q.dtype, log_decay.shape[-1]
        (self.B, self.T, _, self.K), self.V = q.shape, v.shape[3]
        self.heads = [u.shape[2] for u in (q, k, v)]
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        (self.multiprocessors, self.sm), self.gpu = device(q), name(q)
        self.C, self.small = chunk(q.dtype, self.sm), small(q, v)
        self.precision = "tf32" if q.dtype == torch.float16 and self.sm else "ieee"
        self.per_token, self.given, self.sums = log_decay.dim() == 3, {}, None
        walks = self.H * cdiv(self.V, SMALL)
        L = segment(self.T, self.B, self.N, walks, self.multiprocessors)
        self.cut = self.into(self.C if by_chunks else L)
        self.segmented = by_chunks or L <= self.T
        self.segments = self.pieces(self.cut)

    def into(self, L: int) -> Cut:
        """Segments of L tokens."""
        return Cut(self.cu_seqlens, self.T, self.N, cdiv(self.T, L), L)

    def pieces(self, cut: Cut) -> int:
        """How many segments all rows have."""
        return self.B * cut.S if self.cu_seqlens is None else self.T // cut.L + self.N

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def of_heads(self, u: Tensor, count: int) -> Tensor:
        """Memory for a gradient of u by `count` heads: if they are summed, it is rounded after."""
        dtype = u.dtype if count == u.shape[2] else torch.float32
        return self.empty(self.B, self.T, count, u.shape[3], dtype=dtype)

    def summed(self, out: Tensor) -> Tensor:
        """Memory in float32 for what `out` is rounded from, which walks use one after another."""
        if self.sums is None or self.sums.shape != out.shape:
            self.sums = self.empty(*out.shape)
        return self.sums

    def tile(self, kernel: str, X: int, Z: int, ahead: bool = False) -> Tile:
        return chosen(kernel, X, Z, self.dtype, self.sm, ahead, self.gpu)

    def taken(self, x: Tensor | None, columns: int = 0) -> Heads | None:
        """x, which lives as long as this, as kernels take it, made once; with `columns` by a descriptor of
        tiles of so many."""
        if x is None:
            return None
        key = id(x), columns
        if key not in self.given:
            self.given[key] = described(x, self.C, columns) if columns else heads(x)
        return self.given[key]

    def ahead(self, *inputs: Tensor | None) -> bool:
        """Whether a Hopper's unit for copies can load them: chunks of rows that are not packed.

        A Blackwell's registers spill 40 to 80 bytes then, and on sm_103 loops with two stages are not safe.
        """
        able = 90 <= self.sm < 100 and self.dtype == torch.bfloat16 and self.cu_seqlens is None
        return able and all(describable(x) for x in inputs if x is not None)

    def score(self, q: Tensor, k: Tensor, v=None, do=None, drate=None) -> Scores:
        """P, its gradient, the decays."""
        B, T, H, C = self.B, self.T, self.H, self.C
        P = self.empty(B, T, H, C, dtype=kept(self.dtype))
        dP = None if do is None else torch.empty_like(P)
        scores = Scores(P, dP, self.empty(B, T, H), self.empty(B, T, H), drate)
        cut = self.into(C)
        BK, BV = (max(16, min(64, power_of_2(X))) for X in (self.K, self.V))
        fixed = Scoring(H, self.K, self.V, self.per_token, C, BK, BV, self.precision)
        pairs = Pairs(*map(self.taken, (q, k, v, do)))
        scores_kernel[(self.pieces(cut) * H,)](
            pairs, scores, self.rates, cut, self.scale, fixed, **options(4)
        )
        return scores

    def laid(self, part: Part, dots: bool) -> tuple[Tile, bool]:
        """The tile of a walk, and whether its inputs have descriptors."""
        ahead = self.ahead(*part[:4])
        kernel = "walk" + " back" * part.reverse + " with dots" * dots
        return self.tile(kernel, *part.sizes, ahead), ahead

    def walk(self, part: Part, P: Tensor, decays: Decays, out: Tensor, dots: Tensor | None = None) -> Tensor:
        """Fills out, a part's. Rows that a program has no room for are walked after the others, and add to it
        in float32."""
        (X, Z), (t, ahead) = part.sizes, self.laid(part, dots is not None)
        rows, columns = cdiv(X, t.BX), cdiv(Z, t.BZ)
        widths = (t.BX, t.BX, t.BZ, t.BZ, self.C) if ahead else (0,) * 5
        w = None if dots is None else part.w
        roles = Roles(*map(self.taken, (*part[:3], w, P), widths), constant(narrow(self.dtype)))
        sums = None
        if rows > t.TILES:
            sums = out if out.dtype == torch.float32 else self.summed(out)
        DOTS = 0 if dots is None else dots.shape[3]
        for first in range(0, rows, t.TILES):
            left = rows - first
            to = None
            if left <= t.TILES:  # made anew: another output may get the id of one that is gone
                to = described(out, self.C, t.BZ) if ahead and describable(out) else heads(out)
            ends = Ends(part.enter, part.leave, to, sums, dots)
            fixed = Walking(
                self.H, X, Z, *part.steps, first * t.BX, DOTS, part.reverse, self.C, t.BX, t.BZ,
                min(t.TILES, left), t.stages, self.precision,
            )  # fmt: skip
            walk_kernel[(columns * self.segments * self.H,)](
                roles, decays, ends, self.cut, self.scale, fixed, **options(t.warps)
            )
            dots = None if dots is None else dots[..., columns:]
        return out

    def dots(self, part: Part) -> Tensor:
        """Memory for those that its walk leaves for each token and head."""
        (X, Z), (t, _) = part.sizes, self.laid(part, True)
        return self.empty(self.B, self.T, self.H, cdiv(Z, t.BZ) * cdiv(X, t.BX * t.TILES))

    def fused(self, part: Part, out: Tensor) -> Tensor:
        """`walk` of small heads, which finds the scores too."""
        X, Z = part.sizes
        t = self.tile("fused", X, Z)
        fixed = Fused(
            self.H, X, Z, *part.steps, part.reverse, self.per_token, self.C, t.BX, t.BZ, self.precision
        )
        ends = Ends(part.enter, part.leave, heads(out), None, None)
        fused_kernel[(cdiv(Z, t.BZ) * self.segments * self.H,)](
            Roles(*map(self.taken, part[:4]), None, None), ends, self.rates, self.cut, self.scale, fixed,
            **options(t.warps), num_stages=t.stages,
        )  # fmt: skip
        return out

    def add_up(self, y: Tensor, z: Tensor, reverse: bool, to: Added) -> None:
        """What each segment adds to a state."""
        X, Z = y.shape[3], z.shape[3]
        t = self.tile("crossing", X, Z)
        fixed = Crossing(self.H, X, Z, reverse, self.per_token, self.C, t.BX, t.BZ, self.precision)
        crossing_kernel[(cdiv(Z, t.BZ) * cdiv(X, t.BX) * self.segments * self.H,)](
            self.taken(y), self.taken(z), to, self.rates, self.cut, self.scale, fixed,
            **options(t.warps), num_stages=t.stages,
        )  # fmt: skip

    def between_segments(self, y, z, reverse, enter, leave=None, others=None, crossing=None) -> Tensor:
        """The states that enter the segments [segments, H, K, V], found without walking them one by one."""
        states = self.empty(self.segments, self.H, self.K, self.V, dtype=kept(self.dtype))
        added = Added(states, self.empty(self.segments, self.H))
        self.add_up(y, z, reverse, added)
        KV = self.K * self.V
        chain_kernel[(cdiv(KV, BLOCK) * self.H * self.N,)](
            added, enter, leave, others, crossing, self.cut, self.H, KV, reverse, BLOCK, **options(4)
        )
        return states

    def gradients(self, q, k, v, do, outer: Outer) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of small heads, chunk by chunk."""
        shares = [self.H // count for count in self.heads]
        group = lcm(*shares)
        most = max(1, self.segments * self.H // self.multiprocessors)
        each = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
        summed = [gcd(share, each) for share in shares]
        one = shares[0] % each == shares[1] % each == 0
        t = self.tile("gradients", self.K, self.V)
        fixed = Gradients(
            self.H, self.K, self.V, each, *summed, one, self.per_token, self.C, t.BX, t.BZ,
            self.precision,
        )  # fmt: skip
        made = [self.of_heads(u, self.H // n) for u, n in zip((q, k, v), summed)]
        gradients_kernel[(self.segments * self.H // each,)](
            Pairs(*map(self.taken, (q, k, v, do))), Grads(*made), outer, self.rates,
            self.cut, self.scale, fixed, **options(t.warps), num_stages=t.stages,
        )  # fmt: skip
        return tuple(map(shared, made, (q, k, v)))

    def rate(self, q, k, v, do, outer: Outer, crossing: Tensor, drate: Tensor) -> None:
        """Fills drate, of small heads."""
        t = self.tile("gradients", self.K, self.V)
        fixed = Rating(
            self.H, self.K, self.V, self.per_token, self.C, t.BX, t.BZ, crossing.shape[2], self.precision
        )
        small_rate_kernel[(self.segments * self.H,)](
            Pairs(*map(self.taken, (q, k, v, do))), outer, crossing, drate, self.rates, self.cut, self.scale,
            fixed, **options(t.warps), num_stages=t.stages,
        )  # fmt: skip

    def weigh(self, of: Weighed, drate: Tensor) -> None:
        """Adds to drate what is not in one chunk."""
        rate_kernel[(self.segments * self.H,)](
            of, drate, self.cut, self.H, of.into.shape[3], of.crossing.shape[2], self.C, **options(4)
        )

    def recurrent(self, inputs, enter, leave: Tensor, o: Tensor, rows: Tensor | None = None) -> None:
        """Fill o and `leave`, which lies as `enter` or is `enter`."""
        BK = max(16, power_of_2(self.K))
        BV = max(1, min(32, MOST * 32 // BK, power_of_2(self.V)))
        recurrent_kernel[(self.B * self.H * cdiv(self.V, BV),)](
            Inputs(*map(tokens, inputs), self.rates),
            Cache(enter, leave, rows, len(leave), *leave.stride()), o,
            Counts(self.T, *self.heads, self.H, self.H * self.per_token), self.scale, self.K, self.V, BK, BV,
            **options(min(8, max(1, BK * BV // 1024))),
        )  # fmt: skip


def shared(grad: Tensor, u: Tensor) -> Tensor:
    """The gradient of u, summed over the heads that share one of u's, and rounded."""
    return grad if grad.shape == u.shape else grad.unflatten(2, (u.shape[2], -1)).sum(3).to(u.dtype)
