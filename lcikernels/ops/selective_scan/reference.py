"""The selective scan as the paper writes it: N states per channel, one step per token."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See `lcikernels.ops.selective_scan`; computed in the dtype of the inputs."""
    if cu_seqlens is not None:
        parts = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            x_n, dt_n, b_n, c_n, z_n = (u if u is None else u[:, start:end] for u in (x, dt, b, c, z))
            state = None if initial_state is None else initial_state[n : n + 1]
            options = dict(z=z_n, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=state)
            parts.append(selective_scan(x_n, dt_n, a, b_n, c_n, d, **options, return_final_state=True))
        y, states = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
        return (y, states) if return_final_state else y

    (B, _, D), N = x.shape, a.shape[1]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    b, c = (u.repeat_interleave(D // u.shape[2], 2) if u.dim() == 4 else u[:, :, None] for u in (b, c))
    h = x.new_zeros(B, D, N) if initial_state is None else initial_state
    out = []
    for x_t, dt_t, b_t, c_t in zip(x.unbind(1), dt.unbind(1), b.unbind(1), c.unbind(1)):
        h = torch.exp(dt_t[..., None] * a) * h + (dt_t * x_t)[..., None] * b_t  # [B, D, N]
        out.append((c_t * h).sum(-1))
    y = torch.stack(out, 1) if out else x
    y = y if d is None else y + d * x
    y = y if z is None else y * silu(z)
    return (y, h) if return_final_state else y


def selective_scan_segment(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `lcikernels.ops.selective_scan_segment`: the final state after zeros, and all decays."""
    options = dict(dt_bias=dt_bias, dt_softplus=dt_softplus)
    added = selective_scan(x, dt, a, b, b, **options, return_final_state=True)[1]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    return added, torch.exp(dt.sum(1)[..., None] * a)
