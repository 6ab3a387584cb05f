"""What fla's retention and simple gated linear attention compute, and its weights as a matrix."""

import warnings

import torch
from torch import Tensor

from lcikernels.compat.dtypes import alike
from lcikernels.layers.retention import retnet_log_decay
from lcikernels.ops import checks, retention

HEAD_FIRST = {"head_first": "fla has removed it: tensors are [B, T, H, ...]"}
CHUNK_SIZE = {"chunk_size": "it sets how fla computes"}
CU_SEQLENS_CPU = {"cu_seqlens_cpu": "a copy of cu_seqlens"}
RENAMED = {"transpose_state_layout": "the deprecated name of state_v_first, not beside it"}
NOT_PACKED = {"output_attentions": "without cu_seqlens, as in fla"}


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    *,
    state_v_first: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The computation, under the name of the function that was called.

    A single token is one pass over the state here too; `retention_step` would first need a copy of it.
    """
    sizes = check(op, q, k, v, g, g_gamma)
    N, cu_seqlens = checks.packing(op, cu_seqlens, q)
    if initial_state is not None:
        axes = f"{'B' if N is None else 'N'} H {'V K' if state_v_first else 'K V'}"
        checks.shape(op, "initial_state", initial_state, axes, {**sizes, "N": N})
        checks.parameters(op, q, initial_state=initial_state)
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    log_decay = log_decays(q, g, g_gamma)
    if initial_state is not None:
        initial_state = initial_state.to(checks.inner(q))
        initial_state = initial_state.mT if state_v_first else initial_state
    if reverse:
        q, k, v = q.flip(1), k.flip(1), v.flip(1)
        log_decay = log_decay.flip(1) if g is not None else log_decay
        if cu_seqlens is not None:
            cu_seqlens = sizes["T"] - cu_seqlens.flip(0)
            initial_state = None if initial_state is None else initial_state.flip(0)
    o, state = retention(
        *(q, k, v, log_decay),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=True,
    )
    if reverse:
        o, state = o.flip(1), state if cu_seqlens is None else state.flip(0)
    state = state.mT if state_v_first else state
    return o.to(dtype), state if output_final_state else None


def attend_in_parallel(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    scale: float | None,
    output_attentions: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The outputs of `attend`, and the weights that give them where they are asked for."""
    if output_attentions and cu_seqlens is not None:
        checks.refuse(op, "output_attentions", "False with cu_seqlens", repr(output_attentions))
    o, _ = attend(op, q, k, v, g, g_gamma, scale, None, False, cu_seqlens)
    return o, weights(q, k, g, g_gamma, scale) if output_attentions else None


def weights(q: Tensor, k: Tensor, g: Tensor | None, g_gamma: Tensor | None, scale: float | None) -> Tensor:
    """scale q[t] . k[s] exp(sum of the decays of s < r <= t), 0 where s > t: [B, H, T, T] in q's dtype.

    In plain torch, with gradients (in fla they have none).
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype, (q, k) = q.dtype, alike(q, k)
        log_decay = log_decays(q, g, g_gamma)
        (_, T, H, K), inner = q.shape, checks.inner(q)
        rates = q.new_zeros(H, dtype=inner) if log_decay is None else log_decay
        rates = rates if rates.dim() > 1 else rates.expand(1, T, H)
        # float64: over many tokens a float32 sum is off by more than an ulp of a decay between neighbours.
        # exp(-1e3) is 0; -inf would give NaN in a difference.
        sums = rates.clamp(min=-1e3).mT.double().cumsum(-1)
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu_(1)
        decays = (sums[..., :, None] - sums[..., None, :]).to(inner).masked_fill(later, -torch.inf).exp()
        scores = torch.einsum("bthk,bshk->bhts", q.to(inner), k.to(inner))
        return (scores * decays * (K**-0.5 if scale is None else scale)).to(dtype)


def check(
    op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None
) -> dict[str, int]:
    """The sizes, or a refusal: fla shares no heads."""
    sizes: dict[str, int] = {}
    checks.shape(op, "q", q, "B T H K", sizes)
    checks.shape(op, "k", k, "B T H K", sizes)
    checks.shape(op, "v", v, "B T H V", sizes)
    if g is not None:
        checks.shape(op, "g", g, "B T H", sizes)
    if g_gamma is not None:
        checks.shape(op, "g_gamma", g_gamma, "H", sizes)
    checks.parameters(op, q, q=q, k=k, v=v, g=g, g_gamma=g_gamma)
    return sizes


def log_decays(q: Tensor, g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    """The sum of both, in what is computed in for q."""
    g, g_gamma = (u if u is None else u.to(checks.inner(q)) for u in (g, g_gamma))
    if g is None or g_gamma is None:
        return g_gamma if g is None else g
    return g + g_gamma


def retnet_decays(op: str, q: Tensor) -> Tensor:
    """RetNet's decay of each head of q."""
    sizes: dict[str, int] = {}
    checks.shape(op, "q", q, "B T H K", sizes)
    return retnet_log_decay(sizes["H"], q.device)


def v_first(op: str, state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    """state_v_first, also under its old name."""
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        checks.refuse(op, "transpose_state_layout", "left out where state_v_first is given", "both")
    said = f"{op}: transpose_state_layout is deprecated, state_v_first is its name"
    warnings.warn(said, DeprecationWarning, stacklevel=3)  # the published function's caller
    return transpose_state_layout
