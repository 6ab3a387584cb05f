"""Retention as the paper writes it: one state per head, one step per token."""

from itertools import pairwise

import torch
from torch import Tensor


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See `lcikernels.ops.retention`; computed in the dtype of the inputs."""
    B, T, _, K = q.shape
    H = max(q.shape[2], k.shape[2], v.shape[2])
    scale = K**-0.5 if scale is None else scale
    log_decay = (q.new_zeros(H) if log_decay is None else log_decay).expand(B, T, H)
    if cu_seqlens is not None:
        parts = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = None if initial_state is None else initial_state[n : n + 1]
            cut = (x[:, start:end] for x in (q, k, v, log_decay))
            parts.append(retention(*cut, scale=scale, initial_state=state, return_final_state=True))
        o, states = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
        return (o, states) if return_final_state else o

    q, k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k, v))
    S = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for q_t, k_t, v_t, log_decay_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), log_decay.unbind(1)):
        S = log_decay_t.exp()[:, :, None, None] * S + k_t[..., :, None] @ v_t[..., None, :]  # [B, H, K, V]
        out.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
    o = torch.stack(out, 1) if out else v
    return (o, S) if return_final_state else o
