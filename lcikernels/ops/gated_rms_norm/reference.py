"""The gated RMS norm, written out."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = True,
    activation: str = "silu",
    kind: str = "rms",
) -> Tensor:
    """See `lcikernels.ops.gated_rms_norm`; computed in the dtype of the inputs."""
    gate = 1 if gate is None else {"silu": silu, "sigmoid": torch.sigmoid}[activation](gate)
    y = (x if norm_before_gate else x * gate).unflatten(-1, (groups, -1))
    y = y if kind == "rms" else y - y.mean(-1, keepdim=True)
    y = (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)).flatten(-2)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y * gate if norm_before_gate else y
