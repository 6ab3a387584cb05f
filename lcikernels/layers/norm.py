"""The norm between a recurrence and the output projection, with its gate."""

import torch
from torch import Tensor, nn

from lcikernels.ops import gated_rms_norm


class GatedNorm(nn.Module):
    """`gated_rms_norm` of o and gate [..., D] with its options, and with a gain `weight` [D] unless False."""

    def __init__(
        self,
        D: int,
        eps: float,
        *,
        weight: bool = True,
        groups: int = 1,
        norm_before_gate: bool = True,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.options = {
            "eps": eps,
            "groups": groups,
            "norm_before_gate": norm_before_gate,
            "activation": activation,
        }
        self.weight = nn.Parameter(torch.empty(D, device=device, dtype=dtype)) if weight else None

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(o, gate, self.weight, **self.options)
