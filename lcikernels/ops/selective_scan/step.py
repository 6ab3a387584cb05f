"""One token of the selective scan: contract, dispatcher entry, backends."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ... import backends, extension
from .. import checks, states
from ..library import define, refuse_vmap
from .op import check

OP = "selective_scan_step"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.selective_scan.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.selective_scan.kernel", backends.on_gpu),
        "torch": backends.Backend("lcikernels.ops.selective_scan.step", backends.anywhere),
    },
)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    state: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `selective_scan`; `state` is updated in place.

        state <- exp(dt * a) * state + dt * x * b;   y = (c · state + d * x) * silu(z)

    x, dt, z [B, D], a [D, N], b, c [B, N] or [B, G, N], d, dt_bias [D]; dtypes, groups and dt as in
    `selective_scan`. state [B, D, N], of any strides, float32 or 16 bits, or float64 where x is: y is of the
    state before it is rounded to its dtype. With state_indices int32 or int64 [B], state is [S, D, N] and row
    b has state[state_indices[b]]; two rows never the same; where it is negative y is 0 and no state is
    touched. Returns y [B, D] in x's dtype. For decoding, under torch.no_grad(): it has no gradient. Raises
    ValueError where a shape, dtype or device does not fit, or on a CPU an index (on a GPU y is NaN),
    RuntimeError where `backend` cannot run.
    """
    sizes: dict[str, int] = {}
    checks.shape(OP, "x", x, "B D", sizes)
    checks.shape(OP, "dt", dt, "B D", sizes)
    check(OP, x, a, b, c, d, z, dt_bias, "B", sizes)
    checks.activations(OP, x=x, dt=dt, b=b, c=c, z=z)
    checks.flags(OP, dt_softplus=dt_softplus)
    states.check(OP, x, state, "B D N", sizes, state_indices)
    checks.no_derivative(OP, x=x, dt=dt, a=a, b=b, c=c, d=d, z=z, dt_bias=dt_bias, state=state)
    name = backends.choose(OP, backend, x)
    return torch.ops.lcikernels.selective_scan_step(
        x, dt, a, b, c, d, z, dt_bias, dt_softplus, state, state_indices, name
    )


takes = states.none_as_they_are


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
    state_indices: None,
) -> Tensor:
    """The step in plain torch."""
    dtype, D = state.dtype, x.shape[1]
    x, dt = x.to(dtype), dt.to(dtype)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    b, c = (
        u.to(dtype).repeat_interleave(D // u.shape[1], 1) if u.dim() == 3 else u.to(dtype)[:, None]
        for u in (b, c)
    )
    state.mul_((dt[..., None] * a).exp_()).addcmul_((dt * x)[..., None], b)
    y = (state * c).sum(-1)
    y = y if d is None else y.addcmul_(x, d.to(dtype))
    return y if z is None else y.mul_(silu(z.to(dtype)))


def _step(x, dt, a, b, c, d, z, dt_bias, dt_softplus, state, state_indices, backend):
    module = backends.load(OP, backend)

    def step(state, state_indices):
        return module.step(x, dt, a, b, c, d, z, dt_bias, dt_softplus, state, state_indices)

    return states.in_place(OP, state, state_indices, checks.inner(x), module.takes, step).to(x.dtype)


def _step_fake(x, dt, a, b, c, d, z, dt_bias, dt_softplus, state, state_indices, backend):
    return x.new_empty(x.shape)


define(
    "selective_scan_step(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z,"
    " Tensor? dt_bias, bool dt_softplus, Tensor(a!) state, Tensor? state_indices, str backend) -> Tensor",
    _step,
    _step_fake,
)
refuse_vmap(OP)
