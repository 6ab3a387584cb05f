"""One token of retention: contract, dispatcher entry, backends."""

import torch
from torch import Tensor

from ... import backends, extension
from .. import checks
from ..library import define, in_place, refuse_vmap
from .op import check

OP = "retention_step"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.retention.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.retention.kernel", backends.on_gpu),
        "torch": backends.Backend("lcikernels.ops.retention.step", backends.anywhere),
    },
)


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `retention`; `state` is updated in place.

        state <- exp(log_decay) * state + k ⊗ v;   o = scale * q · state

    q [B, Hq, K], k [B, Hk, K], v [B, Hv, V], log_decay [H] or [B, H], state [B, H, K, V] float32; dtypes,
    shared heads and scale as in `retention`. Returns o [B, H, V] in v's dtype. For decoding: it has no
    gradient. Raises ValueError where a shape, dtype or device does not fit, RuntimeError where `backend`
    cannot run.
    """
    sizes = check(q, k, v, log_decay, "B H", OP)
    checks.shape(OP, "state", state, "B H K V", sizes)
    checks.full_precision(OP, q, state=state)
    checks.written(OP, state=state)
    checks.no_derivative(OP, q=q, k=k, v=v, log_decay=log_decay, state=state)
    scale = sizes["K"] ** -0.5 if scale is None else float(scale)
    name = backends.choose(OP, backend, q)
    return torch.ops.lcikernels.retention_step(q, k, v, log_decay, state, scale, name)


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    """The step in plain torch."""
    H = state.shape[1]
    q, k, v = (x.to(state.dtype).repeat_interleave(H // x.shape[1], 1) for x in (q, k, v))
    state.mul_(log_decay.exp()[..., None, None]).addcmul_(k[..., :, None], v[..., None, :])
    return (q[..., None, :] @ state).squeeze(-2).mul_(scale)


def _step(q, k, v, log_decay, state, scale, backend):
    step = backends.load(OP, backend).step
    return in_place(state, lambda state: step(q, k, v, log_decay, state, scale)).to(v.dtype)


def _step_fake(q, k, v, log_decay, state, scale, backend):
    return v.new_empty(v.shape[0], state.shape[1], v.shape[2])


define(
    "retention_step(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, float scale,"
    " str backend) -> Tensor",
    _step,
    _step_fake,
)
refuse_vmap(OP)
