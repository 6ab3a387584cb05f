"""The selective scan in plain torch: step by step over chunks of tokens, so that no [B, T, D, N] ever exists.

Time leads and channels are last. With the D channels in G groups of P, a chunk's states are [C, B, G, N, P]:
a step is one `addcmul_` on a contiguous slab, and nothing else is done step by step. The forward pass writes
the state that enters each chunk; the backward pass recomputes the others from it.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ..checks import boundaries, inner, laid_as

CHUNK = 16  # tokens, where nothing is differentiated: 8 to 32 are equally fast


def forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the final state [B or S, D, N], the state that enters every `every`-th token (0: none)."""
    scan = Scan(x, dt, a, b, c, dt_bias, dt_softplus, initial_state, cu_seqlens, every or CHUNK)
    checkpoints = a.new_empty(-(-scan.T // every) if every else 0, *scan.initial.shape[1:])
    final = scan.initial.clone()
    y = torch.empty_like(scan.x)
    h = scan.initial[0]
    for i, tokens in enumerate(scan.chunks):
        if every:
            checkpoints[i] = h
        _, states = scan.states(tokens, h, final)
        torch.matmul(scan.c[tokens], states, out=y[tokens])
        h = states[-1].clone()
    y = y if d is None else y.addcmul_(scan.per_channel(d), scan.x)
    y = y if z is None else y.mul_(silu(scan.time_first(z)))
    return batch_first(y, x), scan.unslab(final), checkpoints.view(-1, *a.shape)


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    every: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, a, b, c, d, z, dt_bias and the initial state; empty for a missing argument."""
    scan = Scan(x, dt, a, b, c, dt_bias, dt_softplus, initial_state, cu_seqlens, every)
    checkpoints = checkpoints.view(-1, *scan.initial.shape[1:])
    dy = scan.time_first(grad_y)
    if z is not None:
        gate, grad_gated = scan.time_first(z), dy
        dy = dy * silu(gate)
    y = None if z is None else torch.empty_like(scan.x)
    dinitial = torch.zeros_like(scan.initial) if grad_state is None else scan.slab(grad_state).clone()
    dx, dstep, da, db, dc = by_chunks(scan, dy, checkpoints, dinitial, y)
    dstep.addcmul_(dx, scan.x)
    dx.mul_(scan.step)
    dd, dz, ddt_bias = (x.new_empty(0) for _ in range(3))  # three, for outputs must not share memory
    if d is not None:
        dd = (dy * scan.x).sum((0, 1)).flatten().to(d.dtype)
        dx.addcmul_(scan.per_channel(d), dy)
    if z is not None:
        y = y if d is None else y.addcmul_(scan.per_channel(d), scan.x)
        dz = batch_first(torch.ops.aten.silu_backward(y.mul_(grad_gated), gate), z)
    if dt_softplus:
        dstep.mul_(torch.expm1(-scan.step).neg_())  # softplus' = sigmoid = 1 - exp(-softplus)
    if dt_bias is not None:
        ddt_bias = dstep.sum((0, 1)).flatten().to(dt_bias.dtype)
    return (
        batch_first(dx, x),
        batch_first(dstep, dt),
        da.mT.reshape(a.shape).contiguous(),
        batch_first(db, b),
        batch_first(dc, c),
        dd,
        dz,
        ddt_bias,
        x.new_empty(0) if initial_state is None else scan.unslab(dinitial),
    )


class Scan:
    """The inputs laid out for the scan, and its two time loops.

    x, step [T, B, G, 1, P], inputs = step * x, b, c [T, B, G, 1, N], a [G, N, P]. `initial` has a slab [B, G,
    N, P] for each sequence of a packed row, or one slab for a whole batch; `first` and `last` lead from a
    token to its slab. The two buffers [C, B, G, N, P] serve every chunk: fresh memory for each costs more
    than the arithmetic.
    """

    def __init__(self, x, dt, a, b, c, dt_bias, dt_softplus, initial_state, cu_seqlens, length):
        self.T, self.dtype = x.shape[1], inner(x)
        self.G = b.shape[2] if b.dim() == 4 else 1
        self.packed = cu_seqlens is not None
        bounds = boundaries("selective_scan", cu_seqlens, self.T) if self.packed else [0, self.T]
        spans = {n: span for n, span in enumerate(pairwise(bounds)) if span[0] < span[1]}
        self.first = {start: n for n, (start, _) in spans.items()}
        self.last = {end - 1: n for n, (_, end) in spans.items()}
        self.a = a.unflatten(0, (self.G, -1)).mT.contiguous()
        self.x = self.time_first(x)
        step = self.time_first(dt)
        step = step if dt_bias is None else step + self.per_channel(dt_bias)
        self.step = softplus(step) if dt_softplus else step
        self.inputs = self.step * self.x
        self.b, self.c = self.time_first(b.flatten(2)), self.time_first(c.flatten(2))
        states = len(bounds) - 1 if self.packed else x.shape[0]
        self.initial = self.slab(a.new_zeros(states, *a.shape) if initial_state is None else initial_state)
        self.chunks = [slice(start, min(start + length, self.T)) for start in range(0, self.T, length)]
        self.buffers = a.new_empty(2, min(length, self.T), *self.initial.shape[1:])

    def time_first(self, u: Tensor) -> Tensor:
        """[B, T, G * X] -> [T, B, G, 1, X]."""
        return u.to(self.dtype).transpose(0, 1).contiguous().unflatten(2, (self.G, 1, -1))

    def per_channel(self, u: Tensor) -> Tensor:
        """[D] -> [G, 1, P]."""
        return u.to(self.dtype).unflatten(0, (self.G, 1, -1))

    def slab(self, state: Tensor) -> Tensor:
        """[B, D, N] -> [1, B, G, N, P]; of a packed row [N, D, N] -> [N, 1, G, N, P]."""
        return state.unflatten(1, (self.G, -1)).mT.contiguous().unsqueeze(1 if self.packed else 0)

    def unslab(self, state: Tensor) -> Tensor:
        """The inverse of `slab`."""
        return state.flatten(0, 1).mT.flatten(1, 2).contiguous()

    def states(self, tokens: slice, h: Tensor, final: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decays and states of the tokens, [C, B, G, N, P]; h enters; final states go where asked."""
        decay, states = self.buffers[:, : tokens.stop - tokens.start]
        torch.mul(self.step[tokens], self.a, out=decay).exp_()
        torch.mul(self.b[tokens].mT, self.inputs[tokens], out=states)
        for t, decay_t, state in zip(range(tokens.start, tokens.stop), decay.unbind(0), states.unbind(0)):
            if t in self.first:
                h = self.initial[self.first[t]]
            h = state.addcmul_(decay_t, h)
            if final is not None and t in self.last:
                final[self.last[t]] = h
        return decay, states

    def reverse(
        self, tokens: slice, decay: Tensor, dstates: Tensor, carried: Tensor, dinitial: Tensor
    ) -> Tensor:
        """Complete dstates from the last token to the first.

        `dinitial` comes with the gradients of the final states and leaves with those of the initial ones.
        Returns what the token before these receives.
        """
        following = None
        for t in reversed(range(tokens.start, tokens.stop)):
            i = t - tokens.start
            dstate, decay_t = dstates[i], decay[i]
            if t in self.last:
                dstate += dinitial[self.last[t]]
            elif following is None:
                dstate += carried
            else:
                dstate.addcmul_(*following)
            following = decay_t, dstate
            if t in self.first:
                torch.mul(*following, out=dinitial[self.first[t]])
        return decay[0] * dstates[0]


def by_chunks(
    scan: Scan, dy: Tensor, checkpoints: Tensor, dinitial: Tensor, y: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of step * x, of step where it is in the decay, of a, b and c; and y, where it is asked for.

    `dinitial` comes with the gradients of the final states and leaves with those of the initial ones.
    """
    dinputs, dstep, da = torch.empty_like(scan.x), torch.empty_like(scan.x), torch.zeros_like(scan.a)
    db, dc = torch.empty_like(scan.b), torch.empty_like(scan.c)
    carried = torch.zeros_like(scan.initial[0])  # decay * dh of the token that follows the chunk
    dstates_buffer = torch.empty_like(scan.buffers[0])
    for tokens, h in zip(reversed(scan.chunks), checkpoints.flip(0)):
        decay, states = scan.states(tokens, h)
        if y is not None:
            torch.matmul(scan.c[tokens], states, out=y[tokens])
        # A row times a matrix: 9 times as fast as by a column.
        torch.matmul(dy[tokens], states.mT, out=dc[tokens])
        dstates = torch.mul(scan.c[tokens].mT, dy[tokens], out=dstates_buffer[: states.shape[0]])
        carried = scan.reverse(tokens, decay, dstates, carried, dinitial)
        torch.matmul(scan.inputs[tokens], dstates.mT, out=db[tokens])
        torch.matmul(scan.b[tokens], dstates, out=dinputs[tokens])
        dexponent = decay.mul_(dstates)
        dexponent[1:] *= states[:-1]
        dexponent[0] *= h
        for t, n in scan.first.items():
            if tokens.start <= t < tokens.stop:
                torch.mul(dinitial[n], scan.initial[n], out=dexponent[t - tokens.start])
        torch.sum(torch.mul(dexponent, scan.a, out=dstates), -2, keepdim=True, out=dstep[tokens])
        da += dexponent.mul_(scan.step[tokens]).sum((0, 1))
    return dinputs, dstep, da, db, dc


def batch_first(u: Tensor, like: Tensor) -> Tensor:
    """[T, B, G, 1, X] -> [B, T, G * X] or [B, T, G, X], as `like`."""
    return laid_as(u.flatten(2).transpose(0, 1).unflatten(2, like.shape[2:]), like)
