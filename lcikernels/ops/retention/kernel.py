"""Retention in Triton, chunk by chunk, a program's state in its registers. Nothing is saved for the backward.

The output and three gradients are one recurrence in four roles:

    S[t] = decay[t] S[t-1] + y[t] (x) z[t]          out[t] = x[t] . S[t]
    o:   x = q,  y = k,  z = v                      dq:  x = do, y = v,  z = k      forward in time
    dv:  x = k,  y = q,  z = do                     dk:  x = v,  y = do, z = q      backward

In a chunk of C tokens that is products of matrices. With A the running sum of log_decay in the chunk and S
the state that enters it (backward in time: the gradient of the one that leaves, with P transposed and the two
decays exchanged):

    P = (x y^T) * exp(A[t] - A[s]) for s <= t       out = P z + exp(A) x . S
    S <- exp(A[end]) S + y^T (exp(A[end] - A) z)

A program of `walk` owns BZ columns of one head's state in one segment of a sequence, and walks its chunks
with S^T in registers: a tensor core takes it from there. `scores` finds, of all chunks at once, the P that o
and dv share, the one of dq and dk, and the decays; small heads need no such memory, `fused` makes them where
it uses them. A segment is a whole sequence where that fills the GPU, else as many tokens as fill it; where it
is a part of its sequence, `crossing` finds what each adds to the state and joins these. So the last bits
depend on the number of multiprocessors; two runs on one GPU are equal.

Where the gradient of log_decay asks for all states every chunk is a segment. Of small heads, and where heads
share q, k or v, `gradients` then makes all of a chunk's gradients, summed over the heads that share; of wide
ones `rates` adds up what the walks leave for it, and gradients are made for each head and summed by torch.
"""

from torch import Tensor

from ..checks import boundaries, contiguous, looked_at
from ..launch import cdiv
from ..states import all_as_they_are
from .crossing import Added
from .gradients import Outer
from .launch import Part, Problem, at_once, shared
from .rates import Weighed
from .tiles import BLOCK, SHORT
from .walk import Decays


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
    if cu_seqlens is not None and looked_at(cu_seqlens):
        boundaries("retention", cu_seqlens, q.shape[1])
    p = Problem(q, k, v, log_decay, scale, cu_seqlens)
    enter, final = contiguous(initial_state), p.empty(p.N, p.H, p.K, p.V)
    o = p.empty(p.B, p.T, p.H, p.V, dtype=v.dtype)
    if p.T <= SHORT and cu_seqlens is None:
        p.recurrent((q, k, v), enter, final, o)
        return o, final
    if p.segmented:
        enter = p.between_segments(k, v, False, enter, final)
    part = Part(q, k, v, None, enter, None if p.segmented else final, False, False)
    if p.small:
        return p.fused(part, o), final
    scores = p.score(q, k)
    return p.walk(part, scores.P, Decays(scores.since, scores.until), o), final


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
    room = at_once(q, v)
    sharing = room and any(u.shape[2] != grad_o.shape[2] for u in (q, k, v))
    p = Problem(q, k, v, log_decay, scale, cu_seqlens, need_log_decay or sharing)
    enter, end = contiguous(initial_state), contiguous(grad_state)
    dinitial = p.empty(p.N, p.H, p.K, p.V)
    drate = p.empty(p.B, p.T, p.H) if need_log_decay else None
    crossing = None
    if need_log_decay:
        crossing = p.empty(p.segments, p.H, cdiv(p.K * p.V, BLOCK))
    if p.segmented:
        enter = p.between_segments(k, v, False, enter)
        end = p.between_segments(q, grad_o, True, end, dinitial, enter, crossing)
    if room and (need_log_decay or sharing):
        outer = Outer(enter, end)
        grads = p.gradients(q, k, v, grad_o, outer)
        if need_log_decay:
            p.rate(q, k, v, grad_o, outer, crossing, drate)
    else:
        leave = None if p.segmented else dinitial
        parts = (
            Part(grad_o, v, k, q, enter, None, False, True),
            Part(v, grad_o, q, k, end, None, True, True),
            Part(k, q, grad_o, None, end, leave, True, False),
        )
        grads = apart(p, parts, (q, k, v), grad_o, drate, crossing)
    if drate is None:
        return *grads, dinitial.new_zeros(1), dinitial
    return *grads, drate.sum((0, 1)) if log_decay.dim() == 1 else drate, dinitial


def apart(
    p: Problem,
    parts: tuple[Part, Part, Part],
    inputs: tuple[Tensor, Tensor, Tensor],
    grad_o: Tensor,
    drate: Tensor | None,
    crossing: Tensor | None,
) -> list[Tensor]:
    """dq, dk, dv, each by a recurrence of its own."""
    if p.small and drate is None:
        return [shared(p.fused(part, p.of_heads(u, p.H)), u) for part, u in zip(parts, inputs)]
    scores = p.score(*inputs, grad_o, drate)
    decays, dots = Decays(scores.since, scores.until), [None] * 3
    if drate is not None:
        dots = [*map(p.dots, parts[:2]), None]
    grads = [
        shared(p.walk(part, P, decays, p.of_heads(u, p.H), d), u)
        for part, P, u, d in zip(parts, (scores.dP, scores.dP, scores.P), inputs, dots)
    ]
    if drate is not None:
        p.weigh(Weighed(*dots[:2], crossing), drate)
    return grads


def crossing(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What all tokens add to the state that enters them, [B, H, K, V]."""
    return crossed(k, v, log_decay, 1.0, False)


def crossing_back(q: Tensor, grad_o: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """What they add to the gradient of that state, [B, H, K, V]."""
    return crossed(q, grad_o, log_decay, scale, True)


def crossed(y: Tensor, z: Tensor, log_decay: Tensor, scale: float, reverse: bool) -> Tensor:
    """The state behind all of y (x) z, from one end to the other."""
    p = Problem(y, y, z, log_decay, scale, None)
    state = p.empty(p.B, p.H, p.K, p.V)
    if p.segmented:
        p.between_segments(y, z, reverse, None, state)
    else:
        p.add_up(y, z, reverse, Added(state, None))
    return state


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
    rate = log_decay[:, None] if log_decay.dim() == 2 else log_decay
    inputs = [u[:, None] for u in (q, k, v)]
    p = Problem(*inputs, rate, scale, None)
    o = v.new_empty(p.B, 1, p.H, p.V)
    p.recurrent(inputs, state, state, o, contiguous(state_indices))
    return o[:, 0]
