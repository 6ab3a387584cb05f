"""The gated RMS norm, written out."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def gated_rms_norm(
    x: Tensor, gate: Tensor | None = None, weight: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """See `lcikernels.ops.gated_rms_norm`; computed in the dtype of the inputs."""
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if gate is None else y * silu(gate)
