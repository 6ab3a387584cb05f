"""What a segment adds to the scan's state, and what it leaves of it: contract, dispatcher entry, backends."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.utils.flop_counter import register_flop_formula

from ... import backends, extension
from .. import checks
from ..library import define, differentiate, refuse_gradients
from .op import CHECKPOINT_EVERY
from .op import OP as SCAN

OP = "selective_scan_segment"
CHUNK = 16  # tokens whose decays plain torch has in memory

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.selective_scan.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.selective_scan.kernel", backends.on_gpu),
        "torch": backends.Backend("lcikernels.ops.selective_scan.segment", backends.anywhere),
    },
)


def selective_scan_segment(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What T tokens make of the state that enters them, whatever that is:

        dt    = softplus(dt + dt_bias)                                     where asked
        h[T]  = left * h[0] + added
        added = sum_t exp((dt[t+1] + ... + dt[T]) * a) * dt[t] * x[t] * b[t]
        left  = exp((dt[1] + ... + dt[T]) * a)

    x, dt [B, T, D], a [D, N], b [B, T, N] or [B, T, G, N], dt_bias [D]; dtypes and groups as in
    `selective_scan`, which takes c, d and z too.

    Returns added and left [B, D, N], float32 (float64 where x is). Gradients reach every floating argument,
    from both; they cost a forward and a backward pass of `selective_scan`. Raises ValueError where a shape,
    dtype or device does not fit, RuntimeError where `backend` cannot run.
    """
    sizes: dict[str, int] = {}
    checks.shape(OP, "x", x, "B T D", sizes)
    checks.shape(OP, "dt", dt, "B T D", sizes)
    checks.shape(OP, "a", a, "D N", sizes)
    checks.shape(OP, "b", b, "B T N" if checks.axes(OP, "b", b) == 3 else "B T G N", sizes)
    checks.divides(OP, "b", sizes.get("G", 1), sizes["D"], "groups")
    if dt_bias is not None:
        checks.shape(OP, "dt_bias", dt_bias, "D", sizes)
    checks.activations(OP, x=x, dt=dt, b=b)
    checks.full_precision(OP, x, a=a)
    checks.parameters(OP, x, dt_bias=dt_bias)
    checks.flags(OP, dt_softplus=dt_softplus)
    name = backends.choose(OP, backend, x)
    return torch.ops.lcikernels.selective_scan_segment(x, dt, a, b, dt_bias, dt_softplus, name)


def selective_scan_segment_back(
    grad_y: Tensor,
    dt: Tensor,
    a: Tensor,
    c: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    backend: str | None,
) -> Tensor:
    """What a segment adds to the gradient of the state that enters it, beside left times that of h[T]:

        sum_t exp((dt[1] + ... + dt[t]) * a) * grad_y[t] * silu(z[t]) * c[t]

    Arguments as `selective_scan` takes them, grad_y [B, T, D] as it returns y; it checks nothing. Returns
    [B, D, N].
    """
    name = backends.choose(OP, backend, grad_y)
    return torch.ops.lcikernels.selective_scan_segment_back(grad_y, dt, a, c, z, dt_bias, dt_softplus, name)


def crossing(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor]:
    """`added` and `left` in plain torch."""
    steps = step_sizes(dt, a.dtype, dt_bias, dt_softplus)
    return fold(steps, a, steps * x, b), torch.exp(steps.sum(1)[..., None] * a)


def crossing_back(
    grad_y: Tensor,
    dt: Tensor,
    a: Tensor,
    c: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """`selective_scan_segment_back` in plain torch: as forwards in time, with each token's own decay too."""
    steps, dy = step_sizes(dt, a.dtype, dt_bias, dt_softplus), grad_y.to(a.dtype)
    dy = dy if z is None else dy * silu(z.to(a.dtype))
    return fold(steps, a, dy, c, back=True)


def step_sizes(dt: Tensor, dtype: torch.dtype, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    dt = dt.to(dtype)
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    return softplus(dt) if dt_softplus else dt


def fold(steps: Tensor, a: Tensor, u: Tensor, b: Tensor, back: bool = False) -> Tensor:
    """The sum of decay[t] * u[t] * b[t] over time, [B, D, N]: decays to the last token's state, or, `back`,
    to the state before the first."""
    (B, T, _), G = steps.shape, b.shape[2] if b.dim() == 4 else 1
    a = a.clamp(min=-1e30)  # -inf times a step of 0 is NaN
    state = a.new_zeros(B, *a.shape)
    chunks = [slice(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]
    for tokens in reversed(chunks) if back else chunks:
        until = steps[:, tokens].cumsum(1)
        far = until if back else until[:, -1:] - until
        values = torch.exp(far[..., None] * a).mul_(u[:, tokens, :, None]).unflatten(2, (G, -1))
        values *= b[:, tokens].to(a.dtype).view(B, -1, G, 1, a.shape[1])
        state = values.sum(1).flatten(1, 2).addcmul_(torch.exp(until[:, -1, :, None] * a), state)
    return state


def _backward(x, dt, a, b, dt_bias, dt_softplus, grad_added, grad_left, backend):
    """Of `added` by the whole scan's backward pass, whose y has no gradient; of `left` beside it."""
    scan, every = backends.load(SCAN, backend), CHECKPOINT_EVERY[backend]
    inputs = x, dt, a, b, b, None, None, dt_bias, dt_softplus, None, None
    checkpoints = scan.forward(*inputs, every)[2]
    grads = scan.backward(torch.zeros_like(x), grad_added, *inputs, checkpoints, every)
    dx, ddt, da, db, _, _, _, ddt_bias, _ = grads
    if grad_left is not None:
        steps = step_sizes(dt, a.dtype, dt_bias, dt_softplus)
        total = steps.sum(1)[..., None]
        through = grad_left * torch.exp(total * a)
        da = da + (through * total).sum(0)
        through = (through * a).sum(-1)[:, None]  # of each token's step alike
        through = through * -torch.expm1(-steps) if dt_softplus else through.expand_as(dt)
        ddt = (ddt + through).to(dt.dtype)
        if dt_bias is not None:
            ddt_bias = (ddt_bias + through.sum((0, 1))).to(dt_bias.dtype)
    return dx, ddt, da, db, ddt_bias


def _forward_fake(x, dt, a, b, dt_bias, dt_softplus, backend):
    return a.new_empty(x.shape[0], *a.shape), a.new_empty(x.shape[0], *a.shape)


def _backward_fake(x, dt, a, b, dt_bias, dt_softplus, grad_added, grad_left, backend):
    dt_bias = x.new_empty(0) if dt_bias is None else dt_bias.new_empty(dt_bias.shape)
    return *(checks.empty_as(u) for u in (x, dt, a, b)), dt_bias


def _back_fake(grad_y, dt, a, c, z, dt_bias, dt_softplus, backend):
    return a.new_empty(dt.shape[0], *a.shape)


define(
    "selective_scan_segment(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor? dt_bias, bool dt_softplus,"
    " str backend) -> (Tensor, Tensor)",
    backends.hand_over(OP, "crossing"),
    _forward_fake,
)
define(
    "selective_scan_segment_backward(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor? dt_bias,"
    " bool dt_softplus, Tensor? grad_added, Tensor? grad_left, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
define(
    "selective_scan_segment_back(Tensor grad_y, Tensor dt, Tensor a, Tensor c, Tensor? z, Tensor? dt_bias,"
    " bool dt_softplus, str backend) -> Tensor",
    backends.hand_over(OP, "crossing_back"),
    _back_fake,
)


def _setup(ctx, inputs, output):
    x, dt, a, b, dt_bias, ctx.dt_softplus, ctx.backend = inputs
    ctx.save_for_backward(x, dt, a, b, dt_bias)


def _autograd(ctx, grad_added, grad_left):
    *inputs, dt_bias = ctx.saved_tensors
    *grads, ddt_bias = torch.ops.lcikernels.selective_scan_segment_backward(
        *inputs, dt_bias, ctx.dt_softplus, grad_added, grad_left, ctx.backend
    )
    return *grads, None if dt_bias is None else ddt_bias, None, None


differentiate(OP, _autograd, _setup)
refuse_gradients("selective_scan_segment_backward")
refuse_gradients("selective_scan_segment_back")


# Multiply-adds per token, channel and state: decay * h and dt x * b. The backward pass is the scan's.
@register_flop_formula(torch.ops.lcikernels.selective_scan_segment)
def _flops(x, dt, a, *args, **kwargs) -> int:
    B, T, D = x
    return 2 * 2 * B * T * D * a[1]


@register_flop_formula(torch.ops.lcikernels.selective_scan_segment_back)
def _back_flops(grad_y, dt, a, *args, **kwargs) -> int:
    return _flops(grad_y, dt, a)


@register_flop_formula(torch.ops.lcikernels.selective_scan_segment_backward)
def _backward_flops(x, dt, a, *args, **kwargs) -> int:
    B, T, D = x
    return 2 * (3 + 10) * B * T * D * a[1]
