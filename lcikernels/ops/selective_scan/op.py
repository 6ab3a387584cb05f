"""The selective scan: contract, dispatcher entry, autograd formula, backends."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import backends, extension
from .. import checks
from ..library import define, differentiate, refuse_gradients

OP = "selective_scan"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.selective_scan.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.selective_scan.kernel", backends.on_gpu),
        "torch": backends.Backend("lcikernels.ops.selective_scan.chunked", backends.anywhere),
    },
)

# Tokens between the states that the forward pass leaves to the backward pass. cpp: SelectiveScan::CHUNK in
# csrc/cpu/selective_scan.h; triton: CHUNK in kernel.py; torch: 8 to 32 are equally fast.
CHECKPOINT_EVERY = {"cpp": 32, "triton": 64, "torch": 16}


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan: N states per channel, with a step size, an input and an output map that follow the token.

        dt   = softplus(dt + dt_bias)                          where asked
        h[t] = exp(dt[t] * a) * h[t-1] + dt[t] * x[t] * b[t]
        y[t] = (c[t] · h[t] + d * x[t]) * silu(z[t])

    x, dt, z [B, T, D] and b, c [B, T, N] or [B, T, G, N] share one dtype: float32, float64, bfloat16 or
    float16. G divides D and channel i reads group i // (D // G). a [D, N] float32, negative where the state
    shall fade; d, dt_bias [D] of any floating dtype. initial_state [B, D, N] float32 or 16 bits, zeros unless
    given. cu_seqlens int32 or int64 [S+1], B = 1: sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1];
    states are [S, D, N]. Where x is float64, a is too, and initial_state may be.

    Tensors may lie in memory as [B, D, T] or [B, G, N, T]; y lies as x, a gradient as its tensor.

    Returns y [B, T, D] in x's dtype, with return_final_state also h[T] [B or S, D, N] in float32 (float64
    where x is). Gradients reach every floating argument, from y and from h[T]. Raises ValueError where a
    shape, dtype or device does not fit, RuntimeError where `backend` cannot run. Gu and Dao 2023 (Mamba),
    algorithm 2.
    """
    sizes: dict[str, int] = {}
    checks.shape(OP, "x", x, "B T D", sizes)
    checks.shape(OP, "dt", dt, "B T D", sizes)
    check(OP, x, a, b, c, d, z, dt_bias, "B T", sizes)
    checks.activations(OP, x=x, dt=dt, b=b, c=c, z=z)
    checks.flags(OP, dt_softplus=dt_softplus, return_final_state=return_final_state)
    S, cu_seqlens = checks.packing(OP, cu_seqlens, x)
    if initial_state is not None:
        checks.shape(OP, "initial_state", initial_state, "B D N" if S is None else "S D N", {**sizes, "S": S})
        checks.states(OP, x, initial_state=initial_state)
        initial_state = initial_state.to(checks.inner(x))
    name = backends.choose(OP, backend, x)
    floats = (x, dt, a, b, c, d, z, dt_bias, initial_state)
    train = torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in floats)
    every = CHECKPOINT_EVERY[name] if train else 0
    y, state, _ = torch.ops.lcikernels.selective_scan(
        x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens, every, name
    )
    return (y, state) if return_final_state else y


def check(op, x, a, b, c, d, z, dt_bias, lead: str, sizes: dict[str, int]) -> None:
    """Refuse what does not fit x [lead, D]; enters N and G in `sizes`."""
    checks.shape(op, "a", a, "D N", sizes)
    for name, u in (("b", b), ("c", c)):
        grouped = checks.axes(op, name, u) != x.dim()
        checks.shape(op, name, u, f"{lead} G N" if grouped else f"{lead} N", sizes)
    if "G" in sizes:
        checks.divides(op, "b", sizes["G"], sizes["D"], "groups")
    if b.dim() != c.dim():
        checks.refuse(op, "c", f"shaped like b {tuple(b.shape)}", tuple(c.shape))
    for name, u, axes in (("d", d, "D"), ("z", z, f"{lead} D"), ("dt_bias", dt_bias, "D")):
        if u is not None:
            checks.shape(op, name, u, axes, sizes)
    checks.full_precision(op, x, a=a)
    checks.parameters(op, x, d=d, dt_bias=dt_bias)


def checkpoints(B: int, T: int, every: int, backend: str) -> int:
    """How many: of each row, or, in Triton, of the line that all rows make."""
    if not every:
        return 0
    return -(-B * T // every) if backend == "triton" else B * -(-T // every)


def _forward_fake(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens, every, backend):
    (B, T, _), S = x.shape, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        checks.empty_as(x),
        a.new_empty(S, *a.shape),
        a.new_empty(checkpoints(B, T, every, backend), *a.shape),
    )


def _backward_fake(grad_y, grad_state, x, dt, a, b, c, d, z, dt_bias, softplus, state, cu_seqlens, *others):
    inputs = (x, dt, a, b, c, d, z, dt_bias, state)
    return tuple(x.new_empty(0) if u is None else checks.empty_as(u) for u in inputs)


# checkpoints [n, D, N]: the states that enter every `every`-th token, for the backward pass. How the elements
# are ordered is the backend's own business. every = 0: none, where nothing is differentiated.
define(
    "selective_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? dt_bias,"
    " bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, int every, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    backends.hand_over(OP, "forward"),
    _forward_fake,
)
define(
    "selective_scan_backward(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor dt, Tensor a, Tensor b,"
    " Tensor c, Tensor? d, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? initial_state,"
    " Tensor? cu_seqlens, Tensor checkpoints, int every, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends.hand_over(OP, "backward"),
    _backward_fake,
)


def _setup(ctx, inputs, output):
    x, dt, a, b, c, d, z, dt_bias, ctx.dt_softplus, initial_state, cu_seqlens, ctx.every, ctx.backend = inputs
    if not ctx.every:  # vmap has hidden that something requires a gradient
        raise NotImplementedError(f"{OP}: vmap has no gradient of it; call it once")
    ctx.save_for_backward(x, dt, a, b, c, d, z, dt_bias, initial_state, cu_seqlens, output[2])


def _autograd(ctx, grad_y, grad_state, _):
    *inputs, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    grad_y = torch.zeros_like(inputs[0]) if grad_y is None else grad_y
    *grads, dstate = torch.ops.lcikernels.selective_scan_backward(
        grad_y,
        grad_state,
        *inputs,
        ctx.dt_softplus,
        initial_state,
        cu_seqlens,
        checkpoints,
        ctx.every,
        ctx.backend,
    )
    grads = [None if u is None else grad for u, grad in zip(inputs, grads)]
    return *grads, None, None if initial_state is None else dstate, None, None, None


differentiate(OP, _autograd, _setup)
refuse_gradients("selective_scan_backward")


# Multiply-adds of the recurrence per token, channel and state, whatever the backend does: decay * h, dt x * b
# and c · h are 3. Backward: the state again (2), its gradient (2: decay * dh, dy * c), and the sums for a, b,
# c, x and dt (6).
@register_flop_formula(torch.ops.lcikernels.selective_scan)
def _flops(x, dt, a, *args, **kwargs) -> int:
    B, T, D = x
    return 2 * 3 * B * T * D * a[1]


@register_flop_formula(torch.ops.lcikernels.selective_scan_backward)
def _backward_flops(grad_y, grad_state, x, dt, a, *args, **kwargs) -> int:
    B, T, D = x
    return 2 * 10 * B * T * D * a[1]
