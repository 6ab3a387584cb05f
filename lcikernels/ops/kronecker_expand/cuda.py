"""LiGO's expansion by csrc/cuda/kronecker_expand.cu, for an NVIDIA GPU.

Half products are rounded to the dtype of the inputs, so what does not fit in float16 there is infinite here.
float32 is multiplied in tf32 where torch's own products may be: torch.set_float32_matmul_precision("high").
"""

import torch
from torch import Tensor

from ..checks import contiguous


def forward(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Tensor:
    """out [L2 or L1, M, N]."""
    tensors = map(contiguous, (weight, write, read, depth))
    return torch.ops.lcikernels_cpp.kronecker_expand_forward(*tensors, added, tf32())


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
    return torch.ops.lcikernels_cpp.kronecker_expand_backward(*tensors, added, tf32(), need_weight)


def tf32() -> bool:
    """Whether float32 may be cut to tf32 in products."""
    return torch.get_float32_matmul_precision() != "highest"
