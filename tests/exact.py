"""Models that compute in their own dtype throughout: RMSNorms, scans and some softmax of transformers do so
in float32."""

from contextlib import contextmanager
from types import MethodType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcikernels.layers import Mamba2


def exact(model: nn.Module) -> nn.Module:
    """The model in evaluation, with norms and scans that keep its dtype, as our own do by themselves."""
    if getattr(model.config, "num_experts", 0):
        model.set_experts_implementation("eager")
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("lcikernels."):
            continue
        if kind.__name__ == "GraniteMoeHybridMambaLayer":
            module.forward = MethodType(mamba2, module)
        elif "TopKRouter" in kind.__name__:
            module.forward = MethodType(router, module)
        elif "RMSNorm" in kind.__name__ or kind.__name__ == "T5LayerNorm":
            module.forward = MethodType(rms_norm, module)
    return model.eval()


@contextmanager
def exact_softmax():
    """Attention whose softmax asks for float32 gets that of float64 numbers in float64."""
    own = F.softmax

    def softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **named) -> Tensor:
        return own(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **named)

    with patch.object(F, "softmax", softmax):
        yield


def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    gain = self.weight + 1 if "Gemma" in type(self).__name__ else self.weight
    return gain * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def router(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = x.flatten(0, -2) @ self.weight.T
    weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, chosen


def mamba2(self: nn.Module, hidden_states: Tensor, **_) -> Tensor:
    layer = Mamba2(
        self.hidden_size,
        self.ssm_state_size,
        self.conv_kernel_size,
        self.intermediate_size / self.hidden_size,
        num_heads=self.num_heads,
        num_groups=self.n_groups,
        norm_eps=self.layer_norm_epsilon,
        dtype=hidden_states.dtype,
    )
    layer.load_state_dict(self.state_dict())
    return layer(hidden_states)
