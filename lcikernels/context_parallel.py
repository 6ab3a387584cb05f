"""Sequences split over processes: each has a part of the tokens, and the ops as if it had all.

The ranks of a process group have the parts in order, each of any length of its own. A part makes left * S +
added of the state S that enters it, so what enters a rank's part follows from the few numbers of those before
it: one exchange of states, forward. Backward, the gradient of a state crosses the parts from behind in the
same way: one exchange more. Between the two everything is local.

Forward, a rank finds added and left first, then runs the op on the state that enters. For retention that is
K V multiply-adds a token and head beside the op's 2 K V. To run the op on no state and correct its output,
exp(A[t]) q[t] . S, is K V as well, and reads and rounds the output once more. Backward, what the later ranks
ask of a part's final state is found first, by K V again, and so one backward pass of the op (5 K V) gives all
gradients; the gradient of `retention_segment` (2 K V) is for those who join by hand. Likewise the scan: 2 D N
beside 3 D N forward, 2 D N beside 10 D N backward.

Every rank makes the same calls with arguments that require gradients on all ranks or on none, and every rank
runs backward: an exchange waits for all. Gradients of what the ranks share (a, d, log_decay [H], weight, ...)
are those of the rank's own tokens: their sum over the ranks is the whole's. Packed sequences are not served.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from . import ops
from .ops import checks
from .ops.retention.segment import retention_segment_back
from .ops.selective_scan.segment import selective_scan_segment_back

Group = dist.ProcessGroup | None


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    group: Group = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lcikernels.retention` of the tokens that all ranks of `group` have, in the order of the ranks.

    Arguments and results are of this rank's T tokens, log_decay too where it is [B, T, H]. initial_state
    enters the first rank, which alone may give it; the final state is that behind this rank's tokens: the
    last rank's is the sequence's. Raises ValueError as `lcikernels.retention` does, and for a state given to
    another rank.
    """
    if log_decay is None:
        log_decay = q.new_zeros(max(u.shape[2] for u in (q, k, v)), dtype=checks.inner(q))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        segment = ops.retention_segment(k, v, log_decay, backend=backend)
    state, lefts = exchanged("retention", *segment, initial_state, group)
    options = dict(scale=scale, initial_state=state, return_final_state=True, backend=backend)
    o, final = ops.retention(q, k, v, log_decay, **options)

    def back(grad_o, q, log_decay):
        return retention_segment_back(q, grad_o, log_decay, scale, backend)

    o, final = Joined.apply(o, final, lefts, group, back, q, log_decay)
    return (o, final) if return_final_state else o


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    group: Group = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lcikernels.selective_scan` of the tokens that all ranks of `group` have, in the order of the ranks.

    Arguments and results are of this rank's T tokens. initial_state enters the first rank, which alone may
    give it; the final state is that behind this rank's tokens: the last rank's is the sequence's. Raises
    ValueError as `lcikernels.selective_scan` does, and for a state given to another rank.
    """
    steps = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, backend=backend)
    with torch.no_grad():
        segment = ops.selective_scan_segment(x, dt, a, b, **steps)
    state, lefts = exchanged("selective_scan", *segment, initial_state, group)
    options = dict(z=z, initial_state=state, return_final_state=True)
    y, final = ops.selective_scan(x, dt, a, b, c, d, **steps, **options)

    def back(grad_y, dt, a, c, z, dt_bias):
        return selective_scan_segment_back(grad_y, dt, a, c, z, dt_bias, dt_softplus, backend)

    y, final = Joined.apply(y, final, lefts, group, back, dt, a, c, z, dt_bias)
    return (y, final) if return_final_state else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lcikernels.causal_conv1d` of the tokens that all ranks of `group` have, in the order of the ranks.

    Arguments and results are of this rank's T tokens, which may be fewer than W - 1. initial_state enters the
    first rank, which alone may give it; the final state is that behind this rank's tokens. Raises ValueError
    as `lcikernels.causal_conv1d` does, and for a state given to another rank.
    """
    before = halo(x, weight.shape[-1], initial_state=initial_state, group=group)
    return ops.causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=before,
        return_final_state=return_final_state,
        backend=backend,
    )


def entering_state(
    added: Tensor, left: Tensor, *, initial_state: Tensor | None = None, group: Group = None
) -> Tensor:
    """The state that enters this rank's tokens, from what each rank's add to a state and leave of it.

        S[0] = initial_state,   S[rank + 1] = left[rank] * S[rank] + added[rank]

    added and left as `retention_segment` and `selective_scan_segment` return them: left has all axes of added
    or the first of them. initial_state is like added, given on the first rank alone, zeros unless given.
    Returns S[rank], like added. Gradients reach added, left and initial_state from the states of all ranks.
    Raises ValueError where a shape does not fit, and for a state given on another rank.
    """
    op = "entering_state"
    if left.shape != added.shape[: left.dim()]:
        checks.refuse(op, "left", f"of the first axes of added {tuple(added.shape)}", tuple(left.shape))
    left = of_all_axes(left, added)
    if not enters_first(op, initial_state, added.shape, group):
        return Entering.apply(added, left, group)
    initial_state = initial_state.to(added.dtype)
    return initial_state + Entering.apply(torch.addcmul(added, left, initial_state), left, group)


def halo(x: Tensor, width: int, *, initial_state: Tensor | None = None, group: Group = None) -> Tensor:
    """The width - 1 tokens before this rank's, as `causal_conv1d` takes its initial state.

    x [B, T, D], this rank's tokens, also fewer than width - 1. initial_state [B, D, width - 1]: the tokens
    before the first rank's, given there alone, zeros unless given. Returns [B, D, width - 1] float32 (float64
    where x is). Gradients reach x on the ranks whose tokens these are, and initial_state. Raises ValueError
    where a shape or dtype does not fit, and for a state given on another rank.
    """
    sizes: dict[str, int] = {}
    checks.shape("halo", "x", x, "B T D", sizes)
    checks.activations("halo", x=x)
    if width < 1:
        checks.refuse("halo", "width", "at least 1", width)
    shape, count = torch.Size((sizes["B"], sizes["D"], width - 1)), width - 1
    given = enters_first("halo", initial_state, shape, group)
    if not count:
        return x.new_zeros(shape, dtype=checks.inner(x))
    tokens = x[:, -count:].to(checks.inner(x))
    if given:
        initial_state = initial_state.to(tokens.dtype)
        tokens = torch.cat((initial_state.mT, tokens), 1)[:, -count:]
    missing = count - tokens.shape[1]
    before = Halo.apply(pad(tokens, (0, 0, missing, 0)), missing, group).mT
    return before + initial_state if given else before


class Entering(torch.autograd.Function):
    """S[rank] of zeros, of added and left, which has 1 on the axes that it does not have."""

    @staticmethod
    def forward(ctx, added: Tensor, left: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rank = group, dist.get_rank(group)
        all_added, lefts = gathered(added, left, group=group)
        state = crossed(all_added[: ctx.rank], lefts)
        ctx.save_for_backward(lefts, state)
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        lefts, state = ctx.saved_tensors
        grad = leaving(grad, lefts, ctx.rank, ctx.group)
        return grad, (grad * state).sum_to_size(lefts.shape[1:]), None


class Joined(torch.autograd.Function):
    """A rank's y and final state as they are; backward, what the later ranks ask of the state is added.

    `back(grad_y, *inputs)` is what the rank's tokens add to the gradient of the state that enters them. So it
    is known what the final state's is before the op's own backward pass runs, once.
    """

    @staticmethod
    def forward(ctx, y: Tensor, final: Tensor, lefts: Tensor, group: Group, back, *inputs: Tensor | None):
        ctx.group, ctx.back = group, back
        ctx.save_for_backward(lefts, *inputs)
        ctx.mark_dirty(y, final)  # else they would be views, which callers could not write to
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_final: Tensor):
        lefts, *inputs = ctx.saved_tensors
        rank = dist.get_rank(ctx.group)
        entering = ctx.back(grad_y, *inputs) + lefts[rank] * grad_final
        grad_final = grad_final + leaving(entering, lefts, rank, ctx.group)
        return grad_y, grad_final, None, None, None, *(None for _ in inputs)


class Halo(torch.autograd.Function):
    """The tokens before this rank's, of each rank's last ones [B, count, D], `missing` of which are zeros."""

    @staticmethod
    def forward(ctx, tokens: Tensor, missing: int, group: Group) -> Tensor:
        ctx.group, ctx.rank = group, dist.get_rank(group)
        real = (torch.arange(tokens.shape[1], device=tokens.device) >= missing).to(tokens.dtype)
        all_tokens, all_real = gathered(tokens, real, group=group)
        sources = before_each(all_real)
        ctx.save_for_backward(sources)
        none = torch.zeros_like(tokens)[None]
        row = torch.cat((none, all_tokens)).transpose(0, 1).flatten(1, 2)
        return row.index_select(1, sources[ctx.rank])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (sources,) = ctx.saved_tensors
        (all_grads,) = gathered(grad, group=ctx.group)
        count = grad.shape[1]
        place = sources.flatten() - (ctx.rank + 1) * count  # of what each rank read, among this rank's tokens
        own = (place >= 0) & (place < count)
        grads = all_grads.transpose(0, 1).flatten(1, 2) * own[:, None]
        return torch.zeros_like(grad).index_add_(1, place.clamp(0, count - 1), grads), None, None


def before_each(real: Tensor) -> Tensor:
    """Of each rank the places of the tokens before its own [ranks, count], in a row of `count` that are none
    and those of all ranks; real [ranks, count] says which of them are."""
    ranks, count = real.shape
    rank = torch.arange(ranks, device=real.device)
    earlier = rank.repeat_interleave(count) < rank[:, None]
    order = torch.where(earlier, real.flatten(), -1.0)
    return pad(order, (count, 0)).argsort(dim=1, stable=True)[:, -count:]


def exchanged(
    op: str, added: Tensor, left: Tensor, initial_state: Tensor | None, group: Group
) -> tuple[Tensor, Tensor]:
    """The state that enters this rank's tokens, and all ranks' left with the axes of added."""
    left = of_all_axes(left, added)
    given = enters_first(op, initial_state, added.shape, group)
    if given:
        added = torch.addcmul(added, left, initial_state.detach().to(added.dtype))
    all_added, lefts = gathered(added, left, group=group)
    return initial_state if given else crossed(all_added[: dist.get_rank(group)], lefts), lefts


def enters_first(op: str, initial_state: Tensor | None, shape: torch.Size, group: Group) -> bool:
    """Whether it is given; it must be of that shape, and on the first rank."""
    if initial_state is None:
        return False
    if (rank := dist.get_rank(group)) > 0:
        checks.refuse(op, "initial_state", "given on the first rank alone", f"one on rank {rank}")
    if checks.axes(op, "initial_state", initial_state) != len(shape) or initial_state.shape != shape:
        checks.refuse(op, "initial_state", f"of shape {tuple(shape)}", tuple(initial_state.shape))
    return True


def of_all_axes(left: Tensor, added: Tensor) -> Tensor:
    return left.reshape(left.shape + (1,) * (added.dim() - left.dim()))


def gathered(*parts: Tensor, group: Group) -> list[Tensor]:
    """Each from every rank, [ranks, ...], in one exchange."""
    sent = torch.cat([u.flatten() for u in parts])
    received = sent.new_empty(dist.get_world_size(group) * sent.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 warns of it
    gather(received, sent, group=group)
    pieces = received.view(-1, sent.numel()).split([u.numel() for u in parts], 1)
    return [piece.reshape(-1, *u.shape) for piece, u in zip(pieces, parts)]


def crossed(added: Tensor, left: Tensor) -> Tensor:
    """What is behind these parts, in the order in which a state of zeros crosses them."""
    if not len(added):
        return added.new_zeros(added.shape[1:])
    state = added[0]
    for added_here, left_here in zip(added[1:], left[1:]):
        state = torch.addcmul(added_here, left_here, state)
    return state.clone()


def leaving(entering: Tensor, lefts: Tensor, rank: int, group: Group) -> Tensor:
    """The later ranks' gradient of the state behind this rank's tokens.

    entering: what the rank's own tokens add to the gradient of the state before them.
    """
    (all_entering,) = gathered(entering, group=group)
    return crossed(all_entering[rank + 1 :].flip(0), lefts[rank + 1 :].flip(0))
