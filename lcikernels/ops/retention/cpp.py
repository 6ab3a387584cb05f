"""Retention by csrc/cpu/retention.cpp, on a CPU."""

import torch
from torch import Tensor

from ..checks import along_rows, boundaries, contiguous


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
    heads, (rates, *states) = (
        map(along_rows, (q, k, v)),
        map(contiguous, (log_decay, initial_state, cu_seqlens)),
    )
    return torch.ops.lcikernels_cpp.retention_forward(*heads, rates, scale, *states)


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
    grad_state, rates, *states = map(contiguous, (grad_state, log_decay, initial_state, cu_seqlens))
    inputs = grad_o, grad_state, q, k, v, rates, scale, *states, need_log_decay
    return torch.ops.lcikernels_cpp.retention_backward(*inputs)


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    """o [B, H, V]; `state`, contiguous, is updated in place."""
    return torch.ops.lcikernels_cpp.retention_step(*map(contiguous, (q, k, v, log_decay)), state, scale)
