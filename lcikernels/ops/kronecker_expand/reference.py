"""LiGO's expansion, written out (Wang et al. 2023, eq. 6)."""

import torch
from torch import Tensor


def kronecker_expand(
    weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None = None, added: bool = False
) -> Tensor:
    """See `lcikernels.ops.kronecker_expand`; computed in the dtype of the inputs, every width-expanded layer
    in memory."""
    L = weight.shape[0]
    if added:
        write, read = (torch.cat([torch.eye(u.shape[1], dtype=u.dtype), u]) for u in (write, read))
    write, read = (u.expand(L, -1, -1) if u.dim() == 2 else u for u in (write, read))
    wide = torch.einsum("jMm,jmn,jNn->jMN", write, weight, read)
    return wide if depth is None else torch.einsum("ij,jMN->iMN", depth, wide)
