"""The selective scan in C++ (csrc/cpu/selective_scan): a lane per channel, states in vector registers."""

import torch
from torch import Tensor

from ..checks import along_an_axis, boundaries, contiguous, inner
from ..states import int64, native


def forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the final state [B or S, D, N], the state that enters every 32nd token (every=0: none)."""
    if cu_seqlens is not None:
        boundaries("selective_scan", cu_seqlens, x.shape[1])
    inputs = prepare(x, dt, a, b, c, d, z, dt_bias)
    state, bounds = contiguous(initial_state), contiguous(cu_seqlens)
    y, final, checkpoints = torch.ops.lcikernels_cpp.selective_scan_forward(
        *inputs, dt_softplus, state, bounds, every > 0
    )
    return y, final, checkpoints.view(-1, *a.shape)


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    every: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, a, b, c, d, z, dt_bias and the initial state; empty where one is missing."""
    if cu_seqlens is not None:
        boundaries("selective_scan", cu_seqlens, x.shape[1])
    inputs = prepare(x, dt, a, b, c, d, z, dt_bias)
    state, bounds = contiguous(initial_state), contiguous(cu_seqlens)
    checkpoints = checkpoints.view(-1, x.shape[0], a.shape[1], a.shape[0])
    dx, ddt, da, db, dc, dd, dz, ddt_bias, dstate = torch.ops.lcikernels_cpp.selective_scan_backward(
        along_an_axis(grad_y), contiguous(grad_state), checkpoints, *inputs, dt_softplus, state, bounds
    )
    dd = dd if d is None else dd.to(d.dtype)
    ddt_bias = ddt_bias if dt_bias is None else ddt_bias.to(dt_bias.dtype)
    dstate = x.new_empty(0) if initial_state is None else dstate.contiguous()
    return dx, ddt, da, db, dc, dd, dz, ddt_bias, dstate


def takes(state: Tensor, dtype: torch.dtype) -> bool:
    """Whether `step` advances such states [S, D, N] as they are: with a contiguous last axis."""
    return native(state, dtype) and (state.stride(2) == 1 or state.shape[2] == 1)


def crossing(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor]:
    """What all tokens add to the state that enters them, and what they leave of it, [B, D, N]."""
    x, dt, a, b, _, _, _, dt_bias = prepare(x, dt, a, b, b, None, None, dt_bias)
    parts = torch.ops.lcikernels_cpp.selective_scan_crossing(x, dt, a, b, dt_bias, dt_softplus)
    return joined(*(u.unbind(1) for u in parts))


def crossing_back(
    grad_y: Tensor,
    dt: Tensor,
    a: Tensor,
    c: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """What all tokens add to the gradient of the state that enters them, [B, D, N]."""
    grad_y, dt, a, c, _, _, z, dt_bias = prepare(grad_y, dt, a, c, c, None, z, dt_bias)
    arguments = grad_y, dt, a, c, z, dt_bias, dt_softplus
    parts = torch.ops.lcikernels_cpp.selective_scan_crossing_back(*arguments)
    return joined(*(u.unbind(1)[::-1] for u in parts))[0]


def joined(added: tuple[Tensor, ...], left: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Of segments, in the order in which a state crosses them: the same of all."""
    all_added, all_left = added[0].contiguous(), left[0].contiguous()
    for added_here, left_here in zip(added[1:], left[1:]):
        all_added, all_left = torch.addcmul(added_here, left_here, all_added), left_here * all_left
    return all_added, all_left


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
    state_indices: Tensor | None,
) -> Tensor:
    """y [B, D]; the state is advanced."""
    d, dt_bias = parameters(x, d, dt_bias)
    inputs = map(contiguous, (x, dt, a, b, c, d, z, dt_bias))
    return torch.ops.lcikernels_cpp.selective_scan_step(*inputs, dt_softplus, state, int64(state_indices))


def prepare(x, dt, a, b, c, d, z, dt_bias) -> tuple[Tensor | None, ...]:
    """What the library takes of sequences: b and c are read wherever they lie."""
    d, dt_bias = parameters(x, d, dt_bias)
    z = z if z is None else along_an_axis(z)
    return along_an_axis(x), along_an_axis(dt), a.contiguous(), b, c, d, z, dt_bias


def parameters(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, in the dtype of the arithmetic."""
    return [u if u is None else u.to(inner(x)).contiguous() for u in tensors]
