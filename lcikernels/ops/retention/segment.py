"""What a segment adds to retention's state, what it leaves of it: contract, dispatcher entry, backends."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from ... import backends, extension
from .. import checks
from ..checks import inner
from ..library import define, differentiate, refuse_gradients

OP = "retention_segment"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.retention.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.retention.kernel", backends.on_gpu_with_products),
        "torch": backends.Backend("lcikernels.ops.retention.segment", backends.with_float64),
    },
)


def retention_segment(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """What T tokens make of the state that enters them, whatever that is:

        S[T] = left * S[0] + added
        added = sum_t exp(log_decay[t+1] + ... + log_decay[T]) * k[t] ⊗ v[t]
        left = exp(log_decay[1] + ... + log_decay[T])

    k [B, T, Hk, K], v [B, T, Hv, V], log_decay [H] or [B, T, H], None for no decay (H is then max(Hk, Hv));
    dtypes, ranges and shared heads as in `retention`, where q may be what gives H.

    Returns added [B, H, K, V] and left [B, H], float32 (float64 where k is). Gradients reach k, v and
    log_decay, from both. Raises ValueError where a shape, dtype or device does not fit, RuntimeError where
    `backend` cannot run.
    """
    sizes: dict[str, int] = {}
    checks.shape(OP, "k", k, "B T Hk K", sizes)
    checks.shape(OP, "v", v, "B T Hv V", sizes)
    if log_decay is None:
        log_decay = k.new_zeros(max(sizes["Hk"], sizes["Hv"]), dtype=inner(k))
    per_head = checks.axes(OP, "log_decay", log_decay) == 1
    checks.shape(OP, "log_decay", log_decay, "H" if per_head else "B T H", sizes)
    for name in ("k", "v"):
        checks.divides(OP, name, sizes[f"H{name}"], sizes["H"], "heads")
    checks.activations(OP, k=k, v=v)
    checks.full_precision(OP, k, log_decay=log_decay)
    name = backends.choose(OP, backend, k)
    return torch.ops.lcikernels.retention_segment(k, v, log_decay, name)


def retention_segment_back(
    q: Tensor, grad_o: Tensor, log_decay: Tensor, scale: float, backend: str | None
) -> Tensor:
    """What a segment adds to the gradient of the state that enters it, beside left times that of S[T]:

        sum_t exp(log_decay[1] + ... + log_decay[t]) * scale * q[t] ⊗ grad_o[t]

    q [B, T, Hq, K], grad_o [B, T, H, V] and log_decay as `retention` takes and returns them; it checks
    nothing. Returns [B, H, K, V].
    """
    name = backends.choose(OP, backend, q)
    return torch.ops.lcikernels.retention_segment_back(q, grad_o, log_decay, scale, name)


def crossing(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """`added` in plain torch."""
    return outer(k, weighed(v, until_end(log_decay, k.shape[1])))


def crossing_back(q: Tensor, grad_o: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """`retention_segment_back` in plain torch."""
    since_start = rates(log_decay, q.shape[1]).cumsum(1).exp()
    return outer(q, weighed(grad_o, since_start)).mul_(scale)


def rates(log_decay: Tensor, T: int) -> Tensor:
    """[1 or B, T, H] in float64: beside a decay of exp(-100) float32 sums would leave an error of 1e-5.

    exp(-1e3) is 0, in float64 too. Rates below would swallow their neighbours'; -inf gives NaN.
    """
    per_token = log_decay.clamp(min=-1e3).double()
    return per_token.expand(1, T, -1) if log_decay.dim() == 1 else per_token


def until_end(log_decay: Tensor, T: int) -> Tensor:
    """What the state that leaves keeps of each token, [1 or B, T, H] float64."""
    return pad(rates(log_decay, T)[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1)).exp()


def weighed(v: Tensor, weight: Tensor) -> Tensor:
    """weight [.., T, H] times v [B, T, Hv, V], in the dtype of the arithmetic: [B, T, H, V]."""
    H = weight.shape[2]
    v = v.to(inner(v)).repeat_interleave(H // v.shape[2], 2)
    return v * weight.to(v.dtype)[..., None]


def outer(k: Tensor, v: Tensor) -> Tensor:
    """The sum of k[t] ⊗ v[t] over time, [B, H, K, V]: one product for all heads of v that share one of k."""
    (B, _, Hk, K), (H, V) = k.shape, v.shape[2:]
    states = k.to(v.dtype).permute(0, 2, 3, 1) @ v.unflatten(2, (Hk, -1)).flatten(3).transpose(1, 2)
    return states.view(B, Hk, K, H // Hk, V).transpose(2, 3).reshape(B, H, K, V).contiguous()


def backward(
    k: Tensor, v: Tensor, log_decay: Tensor, grad_added: Tensor | None, grad_left: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and log_decay, in plain torch on every device: two products, no scan."""
    (B, T, Hk, _), H, Hv = k.shape, log_decay.shape[-1], v.shape[2]
    weight, dtype = until_end(log_decay, T), inner(k)
    drate = torch.zeros(B, T, H, dtype=torch.float64, device=k.device)
    dk, dv = (u.new_zeros(u.shape) for u in (k, v))
    if grad_added is not None:
        # [B, Hk, K, heads that share one of k's times V]
        grad = grad_added.unflatten(1, (Hk, -1)).transpose(2, 3).flatten(3)
        by_head = weighed(v, weight)
        dk = by_head.unflatten(2, (Hk, -1)).flatten(3).transpose(1, 2) @ grad.mT
        dk = dk.transpose(1, 2).to(k.dtype).contiguous()
        dv = (k.to(dtype).transpose(1, 2) @ grad).transpose(1, 2).unflatten(3, (H // Hk, -1)).flatten(2, 3)
        # A rate weighs what is written before it: sums of these alone, never a difference of larger sums.
        drate[:, 1:] = (by_head * dv).sum(-1)[:, :-1].double().cumsum(1)
        dv = dv.mul_(weight.to(dtype)[..., None])
        dv = dv.unflatten(2, (Hv, -1)).sum(3).to(v.dtype)
    if grad_left is not None:
        drate += (grad_left * left_of(log_decay, B, T))[:, None]
    drate = drate.sum((0, 1)) if log_decay.dim() == 1 else drate
    return dk, dv, drate.to(log_decay.dtype)


def left_of(log_decay: Tensor, B: int, T: int) -> Tensor:
    """What is left of the state that enters, [B, H]."""
    return rates(log_decay, T).sum(1).exp().to(log_decay.dtype).expand(B, -1).contiguous()


def _forward(k, v, log_decay, backend):
    added = backends.load(OP, backend).crossing(k, v, log_decay)
    return added, left_of(log_decay, *k.shape[:2])


def _forward_fake(k, v, log_decay, backend):
    (B, _, _, K), H, V = k.shape, log_decay.shape[-1], v.shape[3]
    return log_decay.new_empty(B, H, K, V), log_decay.new_empty(B, H)


def _backward_fake(k, v, log_decay, grad_added, grad_left):
    return tuple(u.new_empty(u.shape) for u in (k, v, log_decay))


def _back_fake(q, grad_o, log_decay, scale, backend):
    return log_decay.new_empty(q.shape[0], grad_o.shape[2], q.shape[3], grad_o.shape[3])


define(
    "retention_segment(Tensor k, Tensor v, Tensor log_decay, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "retention_segment_backward(Tensor k, Tensor v, Tensor log_decay, Tensor? grad_added, Tensor? grad_left)"
    " -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)
define(
    "retention_segment_back(Tensor q, Tensor grad_o, Tensor log_decay, float scale, str backend) -> Tensor",
    backends.hand_over(OP, "crossing_back"),
    _back_fake,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _autograd(ctx, grad_added, grad_left):
    grads = torch.ops.lcikernels.retention_segment_backward(*ctx.saved_tensors, grad_added, grad_left)
    return *grads, None


differentiate(OP, _autograd, _setup)
refuse_gradients("retention_segment_backward")
refuse_gradients("retention_segment_back")


# K V multiply-adds a token and head, half of retention's; backward the two products of them.
@register_flop_formula([torch.ops.lcikernels.retention_segment, torch.ops.lcikernels.retention_segment_back])
def _flops(k, v, log_decay, *args, **kwargs) -> int:
    B, T, _, K = k
    return 2 * B * T * log_decay[-1] * K * v[3]


@register_flop_formula(torch.ops.lcikernels.retention_segment_backward)
def _backward_flops(k, v, log_decay, *args, **kwargs) -> int:
    return 2 * _flops(k, v, log_decay)
