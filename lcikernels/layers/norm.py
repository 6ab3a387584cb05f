"""Norms: that between a recurrence and the output projection, with its gate; and of heads or streams."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

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


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * gain over D channels, computed in float32 at least and rounded once.

    x [..., D], or heads [..., H, K] with H * K = D, that are normed as one. gain is `weight` [D], or with
    zero_centered 1 + weight.
    """

    def __init__(
        self,
        D: int,
        eps: float,
        *,
        zero_centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.zero_centered = eps, zero_centered
        self.weight = nn.Parameter(torch.empty(D, device=device, dtype=dtype))

    def initial_value(self) -> Tensor:
        """The weight whose gain is 1."""
        return torch.full_like(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.weight):
            return self(x.flatten(-2)).view(x.shape)
        exact = torch.promote_types(x.dtype, torch.float32)
        gain = self.weight.to(exact)
        gain = 1 + gain if self.zero_centered else gain
        return rms_norm(x.to(exact), gain.shape, gain, self.eps).to(x.dtype)
