"""Retention by csrc/cpu/retention.cpp, on a CPU."""

import torch
from torch import Tensor

from ..checks import along_rows, boundaries, contiguous
from ..states import int64, native


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [B or N, H, K, V]."""
    if cu_seqlens is not None:
        boundaries("retention", cu_seqlens, q.shape[1])
    heads, states = map(along_rows, (q, k, v)), map(contiguous, (initial_state, cu_seqlens))
    return torch.ops.lcikernels_cpp.retention_forward(*heads, log_decay, scale, *states)


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay ([1], any number, where it is not needed) and the initial state."""
    grad_o, q, k, v = map(along_rows, (grad_o, q, k, v))
    grad_state, *states = map(contiguous, (grad_state, initial_state, cu_seqlens))
    inputs = grad_o, grad_state, q, k, v, log_decay, scale, *states, need_log_decay
    return torch.ops.lcikernels_cpp.retention_backward(*inputs)


def crossing(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What all tokens add to the state that enters them, [B, H, K, V]."""
    return torch.ops.lcikernels_cpp.retention_crossing(*map(along_rows, (k, v)), log_decay, 1.0, False)


def crossing_back(q: Tensor, grad_o: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """What they add to the gradient of that state, [B, H, K, V]."""
    return torch.ops.lcikernels_cpp.retention_crossing(*map(along_rows, (q, grad_o)), log_decay, scale, True)


def takes(state: Tensor, dtype: torch.dtype) -> bool:
    """Whether `step` advances such states [S, H, K, V] as they are: of contiguous rows or columns."""
    if not native(state, dtype):
        return False
    return 1 in state.stride()[2:] or 1 in state.shape[2:]


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
) -> Tensor:
    """o [B, H, V]; `state` is updated in place."""
    heads = map(along_rows, (q, k, v))
    return torch.ops.lcikernels_cpp.retention_step(*heads, log_decay, state, scale, int64(state_indices))
