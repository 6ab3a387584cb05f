"""Retention: contract, dispatcher entry, autograd formula, backends."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import backends, extension
from .. import checks
from ..library import define, differentiate, refuse_gradients

OP = "retention"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.retention.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.retention.kernel", backends.on_gpu_with_products),
        "torch": backends.Backend("lcikernels.ops.retention.chunked", backends.with_float64),
    },
)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal retention: linear attention whose memory fades.

        S[t] = exp(log_decay[t]) * S[t-1] + k[t] ⊗ v[t]
        o[t] = scale * q[t] · S[t]

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V] share one dtype: float32, float64, bfloat16 or float16.
    With H = max(Hq, Hk, Hv), each count divides H and head h reads head h // (H // Hx). log_decay, float32,
    [H], one rate per head (RetNet), or [B, T, H], one per token (Mamba-2, simple GLA): negative where memory
    fades, -inf where all is forgotten, positive where it grows, by less than exp(80) in 64 tokens; None where
    nothing decays. scale: K ** -0.5 unless given. initial_state [B, H, K, V] float32 or 16 bits, zeros unless
    given. cu_seqlens int32 or int64 [N+1], B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n+1];
    states are [N, H, K, V]. Where q is float64, log_decay is too, and initial_state may be. A GPU takes K and
    V up to 512; it multiplies bfloat16 as such, float16 as tf32, sums in float32.

    Returns o [B, T, H, V] in v's dtype, with return_final_state also S[T] [B or N, H, K, V] in float32
    (float64 where q is). Gradients reach q, k, v, log_decay and initial_state, from o and from S[T]. Raises
    ValueError where a shape, dtype or device does not fit, RuntimeError where `backend` cannot run. Sun et
    al. 2023 (RetNet), eq. 6; Dao and Gu 2024 (Mamba-2) for the rate per token.
    """
    sizes, log_decay = check(q, k, v, log_decay, "B T H")
    checks.flags(OP, return_final_state=return_final_state)
    N, cu_seqlens = checks.packing(OP, cu_seqlens, q)
    if initial_state is not None:
        axes = "B H K V" if N is None else "N H K V"
        checks.shape(OP, "initial_state", initial_state, axes, {**sizes, "N": N})
        checks.states(OP, q, initial_state=initial_state)
        initial_state = initial_state.to(checks.inner(q))
    name = backends.choose(OP, backend, q)
    scale = sizes["K"] ** -0.5 if scale is None else checks.number(OP, "scale", scale)
    o, state = torch.ops.lcikernels.retention(q, k, v, log_decay, scale, initial_state, cu_seqlens, name)
    return (o, state) if return_final_state else o


def check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, per_token: str, op: str = OP
) -> tuple[dict[str, int], Tensor]:
    """The sizes and the rates, 0 for None, or a refusal; `per_token`: axes of a log_decay that is not [H]."""
    sizes: dict[str, int] = {}
    lead = per_token.removesuffix(" H")
    checks.shape(op, "q", q, f"{lead} Hq K", sizes)
    checks.shape(op, "k", k, f"{lead} Hk K", sizes)
    checks.shape(op, "v", v, f"{lead} Hv V", sizes)
    sizes["H"] = max(sizes["Hq"], sizes["Hk"], sizes["Hv"])
    for name, heads in (("q", "Hq"), ("k", "Hk"), ("v", "Hv")):
        checks.divides(op, name, sizes[heads], sizes["H"], "heads")
    checks.activations(op, q=q, k=k, v=v)
    if log_decay is None:
        return sizes, q.new_zeros(sizes["H"], dtype=checks.inner(q))
    rates = "H" if checks.axes(op, "log_decay", log_decay) == 1 else per_token
    checks.shape(op, "log_decay", log_decay, rates, sizes)
    checks.full_precision(op, q, log_decay=log_decay)
    return sizes, log_decay


def _forward_fake(q, k, v, log_decay, scale, initial_state, cu_seqlens, backend):
    B, T, _, K = q.shape
    H, V = max(q.shape[2], k.shape[2], v.shape[2]), v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(B, T, H, V), q.new_empty(N, H, K, V, dtype=checks.inner(q))


def _backward_fake(grad_o, grad_state, q, k, v, log_decay, scale, state, cu_seqlens, need_log_decay, backend):
    state = _forward_fake(q, k, v, log_decay, scale, state, cu_seqlens, backend)[1]
    dlog_decay = log_decay.new_empty(log_decay.shape if need_log_decay else 1)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog_decay, state


define(
    "retention(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial_state,"
    " Tensor? cu_seqlens, str backend) -> (Tensor, Tensor)",
    backends.hand_over(OP, "forward"),
    _forward_fake,
)
define(
    "retention_backward(Tensor grad_o, Tensor? grad_state, Tensor q, Tensor k, Tensor v, Tensor log_decay,"
    " float scale, Tensor? initial_state, Tensor? cu_seqlens, bool need_log_decay, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends.hand_over(OP, "backward"),
    _backward_fake,
)


def _setup(ctx, inputs, output):
    q, k, v, log_decay, ctx.scale, initial_state, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens)
    ctx.o_like = output[0].shape


def _autograd(ctx, grad_o, grad_state):
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    grad_o = v.new_zeros(ctx.o_like) if grad_o is None else grad_o
    dq, dk, dv, dlog_decay, dstate = torch.ops.lcikernels.retention_backward(
        grad_o,
        grad_state,
        q,
        k,
        v,
        log_decay,
        ctx.scale,
        initial_state,
        cu_seqlens,
        ctx.needs_input_grad[3],
        ctx.backend,
    )
    dlog_decay = dlog_decay if ctx.needs_input_grad[3] else None
    return dq, dk, dv, dlog_decay, None, None if initial_state is None else dstate, None, None


differentiate(OP, _autograd, _setup)
refuse_gradients("retention_backward")


# Counted as the recurrence, whatever the backend does: the state takes k ⊗ v (K V multiply-adds a token and
# head) and q reads it (K V). The backward recomputes the state and has two products for each of the two:
# 5 K V.
@register_flop_formula(torch.ops.lcikernels.retention)
def _flops(q, k, v, *args, **kwargs) -> int:
    B, T, Hq, K = q
    return 2 * B * T * max(Hq, k[2], v[2]) * 2 * K * v[3]


@register_flop_formula(torch.ops.lcikernels.retention_backward)
def _backward_flops(grad_o, grad_state, q, k, v, *args, **kwargs) -> int:
    return _flops(q, k, v) * 5 // 2
