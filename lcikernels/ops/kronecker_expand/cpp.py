"""LiGO's expansion in C++ (csrc/kronecker_expand.cpp): all sums are float32 at least."""

import torch
from torch import Tensor

from ..checks import contiguous

TF32 = False  # a GPU's


def forward(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Tensor:
    """out [L2 or L1, M, N]."""
    tensors = map(contiguous, (weight, write, read, depth))
    return torch.ops.lcikernels_cpp.kronecker_expand_forward(*tensors, added, TF32)


def backward(
    grad_out: Tensor,
    weight: Tensor,
    write: Tensor,
    read: Tensor,
    depth: Tensor | None,
    added: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, write, read and depth; empty ones for what is not needed or missing."""
    tensors = map(contiguous, (grad_out, weight, write, read, depth))
    return torch.ops.lcikernels_cpp.kronecker_expand_backward(*tensors, added, TF32, need_weight)
