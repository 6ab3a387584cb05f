"""The selective scan in Triton: sequential in time, a program's states in registers.

The sequences, rows of a batch or packed in one, make one line of L tokens. A program owns BD channels of one
group in one segment of the line, and walks the sequences that are in it. A tile of states is [BN, BD] and its
loads run along BD: in the forward pass the states of a channel lie in one thread, and a sum over them asks no
other. So tensors of states are [..., N, D] here, and a is [N, D].

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers

Time goes in chunks of CHUNK tokens of the line; the forward pass leaves the states that enter them. The
backward walks the chunks in reverse: once through a chunk for the states that enter every STEPS tokens of
it, then STEPS tokens at a time, whose states and decays stay in registers. Sums over channels are written
for each block of channels, a slab of each segment at a time, and added in order by `collect_kernel`.

Segments are as many as fill the GPU. Where one ends inside a sequence, a pass before finds what each adds to
a state that crosses it and what it leaves of that state, and `chain_kernel` joins them; then all run at once.
So the last bits depend on the number of multiprocessors; two runs on one GPU are equal.

What lies [B, D, T] in memory is copied to tokens and back by `views.copy_kernel`, at the speed of memory: 4
bytes an element and tensor, 0.06 ms at B 8, T 4096, D 2048 in 16 bits, beside 0.5 ms of a forward pass.
Loaded by strides, a token of 32 channels would be 32 sectors of 2 bytes: for three tensors and four warps 384
cycles a token of a multiprocessor's cache, whose arithmetic takes 145; and a store as many partial writes.
"""

import torch
from torch import Tensor

from ..checks import boundaries, channels_first, contiguous, empty_as, looked_at, refuse
from ..launch import cdiv, device, name, options, power_of_2
from ..states import all_as_they_are
from ..views import like, line, tokens
from .backward import Back, backward_kernel
from .crossing import chain_kernel, crossing_back_kernel
from .forward import Made, forward_kernel
from .line import Fixed, Given, pair_kernel
from .one import States, Token, step_kernel
from .sums import collect_kernel, totals_kernel
from .tiles import CHUNK, SHORT, chosen, cut, up

# Of a segment, by STEPS: partial sums of db, dc and scratch stay below a fifth of the rest.
SLABS = {1: 5, 2: 3}
MOST_STATES = 256  # 512 would leave the 8 warps of a program 4 channels, backward
MOST_APART = 4  # D between tokens of one tensor, each compiled anew: a half or a quarter of a projection


def refuse_more_states(N: int) -> None:
    if N > MOST_STATES:
        refuse("selective_scan", "a", f"[D, N] with N at most {MOST_STATES} for backend 'triton'", N)


class Problem:
    """The inputs as the kernels of one pass take them, and how they are cut."""

    def __init__(self, dy, x, dt, a, b, c, d, z, dt_bias, softplus, initial_state, cu_seqlens):
        refuse_more_states(a.shape[1])
        B, T, self.D = x.shape
        self.N, self.G = a.shape[1], b.shape[2] if b.dim() == 4 else 1
        self.S, self.L = B if cu_seqlens is None else cu_seqlens.shape[0] - 1, B * T
        self.given = Given(
            *map(rows, (x, dt, z)),
            a.mT.contiguous(),
            self.pair(b, c),
            *(u if u is None else u.float().contiguous() for u in (d, dt_bias)),
            initial_state if initial_state is None else initial_state.mT.contiguous(),
            contiguous(cu_seqlens),
        )
        self.dy = rows(dy)
        processors, sm = device(x)
        BN, self.BD, self.warps, self.STEPS, AHEAD = chosen(
            self.N, sm, dy is not None, x.dtype == torch.float32, name(x)
        )
        self.blocks = self.G * cdiv(self.D // self.G, self.BD)
        self.segment = cut(B, T, self.blocks * self.warps, processors)
        self.segments = cdiv(self.L, self.segment)
        self.crossed = self.segments > 1 and (cu_seqlens is not None or self.segment % T > 0)
        self.programs = (self.segments * self.blocks,)
        self.line = self.S, T, self.L, self.D, self.G, self.segment
        self.fixed = Fixed(self.N, BN, self.BD, self.STEPS, AHEAD, CHUNK, softplus, *self.apart())
        self.options = options(self.warps)

    def apart(self) -> tuple[int, ...]:
        """How many D it is from token to token in x, dt, z, dy. Without z, kernels read what they have."""
        x, dt, dy = self.given.x, self.given.dt, self.given.x if self.dy is None else self.dy
        z = dy if self.given.z is None else self.given.z
        return tuple(u.stride(0) // self.D for u in (x, dt, z, dy))

    def pair(self, b: Tensor, c: Tensor) -> Tensor:
        """b and c side by side [B, T, G, 2 N], in float32."""
        (B, T), BN, G = b.shape[:2], power_of_2(self.N), self.G
        BT = max(1, 2048 // BN)
        bc = b.new_empty(B, T, G, 2 * self.N, dtype=torch.float32)
        views = tokens(of_groups(b)), tokens(of_groups(c))
        pair_kernel[(B * G * cdiv(T, BT),)](*views, bc, T, G, self.N, BT, BN)
        return bc

    def states(self, *lead: int) -> Tensor:
        """Memory for states of each of `lead`."""
        return self.given.x.new_empty(*lead, self.N, self.D, dtype=torch.float32)

    def grad(self, u: Tensor | None) -> Tensor | None:
        """Memory for u's likes, as kernels write them."""
        return u if u is None else u.new_empty(self.L, self.D)

    def forward(self, made: Made, entering: Tensor | None) -> None:
        forward_kernel[self.programs](self.given, made, entering, *self.line, self.fixed, **self.options)

    def entering(self) -> Tensor | None:
        """The states that enter the segments [segments, N, D], where one ends inside a sequence."""
        if not self.crossed:
            return None
        states, added = self.states(self.segments), self.states(self.segments)
        total = added.new_empty(self.segments, self.D)
        self.forward(Made(None, added, None, total), None)
        self.chain(added, total, states, False)
        return states

    def leaving(self, dfinal: Tensor | None, grads: Tensor) -> None:
        """Sets grads to those of the states that leave the segments, where one ends inside a sequence."""
        if not self.crossed:
            return
        added, total = torch.empty_like(grads), grads.new_empty(self.segments, self.D)
        self.crossing_back(dfinal, added, total)
        self.chain(added, total, grads, True)

    def crossing_back(self, dfinal: Tensor | None, added: Tensor, total: Tensor) -> None:
        crossing_back_kernel[self.programs](
            self.given, self.dy, dfinal, added, total, *self.line, self.fixed, **self.options
        )

    def chain(self, added: Tensor, total: Tensor, states: Tensor, reverse: bool) -> None:
        chain_kernel[(cdiv(self.D, self.BD),)](
            self.given.a, added, total, states, self.D, self.segments, *self.fixed[:3], reverse,
            **self.options,
        )  # fmt: skip


def in_slabs(segment: int, STEPS: int) -> tuple[int, int]:
    """Tokens of a slab, and how many there are."""
    length = segment + (CHUNK - 1 if segment % CHUNK else 0)  # of a segment and its first chunk's start
    slab = min(up(length, CHUNK), max(SHORT, up(cdiv(length, SLABS[STEPS]), CHUNK)))
    return slab, cdiv(length, slab)


def rows(u: Tensor | None) -> Tensor | None:
    """u [B, T, D] as [B T, D] whose tokens are few D apart."""
    if u is None:
        return None
    D, u = u.shape[-1], line(u)
    return u if u.stride(0) in range(0, D * MOST_APART + 1, D) else u.contiguous()


def grad_of_state(state: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a state, that lies [.., N, D], as `empty_as` gives it."""
    return grad if channels_first(state) else grad.contiguous()


def of_groups(u: Tensor) -> Tensor:
    """b or c as [B, T, G, N]."""
    return u if u.dim() == 4 else u.unsqueeze(2)


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
    """y [B, T, D], the final state [B or S, D, N], the states that enter every 64th token (0: none)."""
    if cu_seqlens is not None and looked_at(cu_seqlens):
        boundaries("selective_scan", cu_seqlens, x.shape[1])
    assert every in (0, CHUNK)
    p = Problem(None, x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    y, final = p.grad(x), p.states(p.S)
    checkpoints = p.states(cdiv(p.L, CHUNK) if every else 0)
    p.forward(Made(y, final, checkpoints if every else None, None), p.entering())
    return like(x, y), final.mT.contiguous(), checkpoints.view(-1, p.D, p.N)


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
    """Gradients of x, dt, a, b, c, d, z, dt_bias and the initial state; empty where one is missing."""
    assert every == CHUNK
    p = Problem(grad_y, x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    dfinal = grad_state if grad_state is None else grad_state.mT.contiguous()
    db, dc = empty_as(b), empty_as(c)
    slab, slabs = in_slabs(p.segment, p.STEPS)
    edges, parts = p.states(slabs + 1, p.segments), p.states(slabs, p.segments)
    p.leaving(dfinal, edges[-1])
    back = Back(
        checkpoints.contiguous(),
        p.dy,
        dfinal,
        edges,
        *map(p.grad, (x, dt, z)),
        parts,
        parts.new_empty(p.programs[0], slab, 2 * p.N),
        *(parts.new_empty(slabs, p.segments, p.D) for _ in range(2)),
        None if initial_state is None else p.states(p.S),
        parts.new_empty(p.segments, CHUNK // p.STEPS, p.N, p.D),
    )
    BT = max(1, 2048 // p.fixed.BN)
    for i in reversed(range(slabs)):
        backward_kernel[p.programs](p.given, back, *p.line, slab, i, p.fixed, **p.options)
        collect_kernel[(p.segments * p.G * cdiv(slab, BT),)](
            back.dbc, tokens(of_groups(db)), tokens(of_groups(dc)), p.line[1], p.L, p.G, p.blocks // p.G,
            p.segment, slab, i, p.N, p.fixed.BN, BT, CHUNK,
        )  # fmt: skip
    da = a.new_empty(a.shape)
    dd, dbias = (None if u is None else a.new_empty(p.D) for u in (d, dt_bias))
    totals_kernel[(cdiv(p.D, p.BD),)](back, da, dd, dbias, slabs * p.segments, p.D, *p.fixed[:3], **p.options)
    return (
        like(x, back.dx),
        like(dt, back.ddt),
        da,
        db,
        dc,
        x.new_empty(0) if d is None else dd.to(d.dtype),
        x.new_empty(0) if z is None else like(z, back.dz),
        x.new_empty(0) if dt_bias is None else dbias.to(dt_bias.dtype),
        x.new_empty(0) if initial_state is None else grad_of_state(initial_state, back.dstate.mT),
    )


takes = all_as_they_are


def crossing(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor]:
    """What all tokens add to the state that enters them, and what they leave of it, [B, D, N]."""
    added, left = [], []
    for x_b, dt_b, b_b in zip(x.split(1), dt.split(1), b.split(1)):
        p = Problem(None, x_b, dt_b, a, b_b, b_b, None, None, dt_bias, dt_softplus, None, around(x_b))
        parts = p.states(p.segments)
        total = parts.new_empty(p.segments, p.D)
        p.forward(Made(None, parts, None, total), None)
        added.append(joined(p.given.a, parts.flip(0), total.flip(0)))
        left.append(faded(p.given.a, total.sum(0)))
    return tuple(torch.stack(u).mT.contiguous() for u in (added, left))


def crossing_back(
    grad_y: Tensor,
    dt: Tensor,
    a: Tensor,
    c: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """What all tokens add to the gradient of the state that enters them, [B, D, N]."""
    added = []
    for i in range(dt.shape[0]):
        dy_b, dt_b, c_b, z_b = (u if u is None else u[i : i + 1] for u in (grad_y, dt, c, z))
        dy_b = rows(dy_b)[None]  # in x's place too, which nothing reads: copied once at most
        p = Problem(dy_b, dy_b, dt_b, a, c_b, c_b, None, z_b, dt_bias, dt_softplus, None, around(dt_b))
        parts = p.states(p.segments)
        total = parts.new_empty(p.segments, p.D)
        p.crossing_back(None, parts, total)
        added.append(joined(p.given.a, parts, total))
    return torch.stack(added).mT.contiguous()


def around(x: Tensor) -> Tensor:
    """cu_seqlens of a sequence that goes through the row x [1, T, D]: from before it to behind it."""
    return torch.arange(-1, x.shape[1] + 2, x.shape[1] + 2, dtype=torch.int32, device=x.device)


def joined(a: Tensor, added: Tensor, total: Tensor) -> Tensor:
    """The sum of `added` [segments, N, D], faded by the steps [segments, D] of those before."""
    before = total.cumsum(0) - total
    return (faded(a, before) * added).sum(0)


def faded(a: Tensor, steps: Tensor) -> Tensor:
    """What so long a step leaves of a state, [.., N, D]; -inf times a step of 0 would be NaN."""
    return torch.exp(a.clamp(min=-1e30) * steps[..., None, :])


def step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor,
    state_indices: Tensor | None,
) -> Tensor:
    """y [B, D]; the state is advanced."""
    (B, D), N, G = x.shape, a.shape[1], b.shape[1] if b.dim() == 3 else 1
    refuse_more_states(N)
    BN, BD = power_of_2(N), 32
    inputs = [contiguous(u) for u in (x, dt, z, a, b, c, d, dt_bias)]
    y = torch.empty_like(inputs[0])
    states = States(state, *state.stride(), contiguous(state_indices))
    step_kernel[(B * G * cdiv(D // G, BD),)](
        Token(*inputs), states, y, D, G, len(state), N, BN, BD, dt_softplus, **options(1 if BN <= 16 else 4)
    )
    return y
