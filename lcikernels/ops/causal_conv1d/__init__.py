"""The causal convolution: the few tokens that Mamba looks back on before its scan."""

from .op import causal_conv1d
from .step import causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]
