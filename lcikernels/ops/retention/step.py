"""One token of retention: contract, dispatcher entry, backends."""

import torch
from torch import Tensor

from ... import backends, extension
from .. import checks, states
from ..library import define, refuse_vmap
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
    log_decay: Tensor | None,
    *,
    state: Tensor,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `retention`; `state` is updated in place.

        state <- exp(log_decay) * state + k ⊗ v;   o = scale * q · state

    q [B, Hq, K], k [B, Hk, K], v [B, Hv, V], log_decay [H], [B, H] or None; dtypes, shared heads and scale as
    in `retention`. state [B, H, K, V], of any strides, float32 or 16 bits, or float64 where q is: o is of the
    state before it is rounded to its dtype. With state_indices int32 or int64 [B], state is [S, H, K, V] and
    row b has state[state_indices[b]]; two rows never the same; where it is negative o is 0 and no state is
    touched. Returns o [B, H, V] in v's dtype. For decoding: it has no gradient. Raises ValueError where a
    shape, dtype or device does not fit, or on a CPU an index (on a GPU o is NaN), RuntimeError where
    `backend` cannot run.
    """
    sizes, log_decay = check(q, k, v, log_decay, "B H", OP)
    states.check(OP, q, state, "B H K V", sizes, state_indices)
    checks.no_derivative(OP, q=q, k=k, v=v, log_decay=log_decay, state=state)
    scale = sizes["K"] ** -0.5 if scale is None else checks.number(OP, "scale", scale)
    name = backends.choose(OP, backend, q)
    return torch.ops.lcikernels.retention_step(q, k, v, log_decay, state, scale, state_indices, name)


takes = states.none_as_they_are


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, state_indices: None
) -> Tensor:
    """The step in plain torch."""
    H = state.shape[1]
    q, k, v = (x.to(state.dtype).repeat_interleave(H // x.shape[1], 1) for x in (q, k, v))
    state.mul_(log_decay.exp()[..., None, None]).addcmul_(k[..., :, None], v[..., None, :])
    return (q[..., None, :] @ state).squeeze(-2).mul_(scale)


def _step(q, k, v, log_decay, state, scale, state_indices, backend):
    module = backends.load(OP, backend)

    def step(state, state_indices):
        return module.step(q, k, v, log_decay, state, scale, state_indices)

    return states.in_place(OP, state, state_indices, checks.inner(q), module.takes, step).to(v.dtype)


def _step_fake(q, k, v, log_decay, state, scale, state_indices, backend):
    return v.new_empty(v.shape[0], state.shape[1], v.shape[2])


define(
    "retention_step(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, float scale,"
    " Tensor? state_indices, str backend) -> Tensor",
    _step,
    _step_fake,
)
refuse_vmap(OP)
