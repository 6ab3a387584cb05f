"""Models that compute in their own dtype throughout: RMSNorms of transformers do so in float32."""

from types import MethodType

from torch import Tensor, nn


def exact(model: nn.Module) -> nn.Module:
    """The model in evaluation, with norms that keep its dtype, as our own do by themselves."""
    for module in model.modules():
        if type(module).__module__.startswith("lcikernels."):
            continue
        if "RMSNorm" in type(module).__name__ or type(module).__name__ == "T5LayerNorm":
            module.forward = MethodType(rms_norm, module)
    return model.eval()


def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    gain = self.weight + 1 if "Gemma" in type(self).__name__ else self.weight
    return gain * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
