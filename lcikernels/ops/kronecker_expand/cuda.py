"""LiGO's expansion by csrc/cuda/kronecker_expand.cu, for an NVIDIA GPU.

Half products are rounded to the dtype of the inputs, so what does not fit in float16 there is infinite here.
float32 is multiplied in tf32 where torch's own products may be: torch.set_float32_matmul_precision("high").
Where units are added, the identity is multiplied like any map.
"""

import torch
from torch import Tensor

from ..checks import contiguous


def forward(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Tensor:
    """out [L2 or L1, M, N]."""
    tensors = map(contiguous, (weight, whole(write, added), whole(read, added), depth))
    return torch.ops.lcikernels_cpp.kronecker_expand_forward(*tensors, tf32())


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
    tensors = map(contiguous, (grad_out, weight, whole(write, added), whole(read, added), depth))
    dweight, *dmaps, ddepth = torch.ops.lcikernels_cpp.kronecker_expand_backward(
        *tensors, tf32(), need_weight
    )
    if added:
        dmaps = [du[u.shape[1] :].clone() for du, u in zip(dmaps, (write, read))]  # an op returns no views
    return dweight, *dmaps, ddepth


def whole(u: Tensor, added: bool) -> Tensor:
    """The map of all units, where u is that of the added ones."""
    return torch.cat([torch.eye(u.shape[1], dtype=u.dtype, device=u.device), u]) if added else u


def tf32() -> bool:
    """Whether float32 may be cut to tf32 in products."""
    return torch.get_float32_matmul_precision() != "highest"
