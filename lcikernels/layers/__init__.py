"""The parts of a block: mixers `Attention`, `Retention`, `Mamba`; `MLP`; and the cache layer `RecurrentLayer`."""

from lcikernels.layers.attention import Attention
from lcikernels.layers.mamba import Mamba
from lcikernels.layers.mlp import MLP
from lcikernels.layers.retention import Retention
from lcikernels.layers.state import RecurrentLayer

__all__ = ["MLP", "Attention", "Mamba", "RecurrentLayer", "Retention"]
