"""The parts of a block: three mixers, the MLP, and the cache layer that keeps a mixer's state.

They need transformers: pip install lcikernels[growth].
"""

from lcikernels.layers.attention import Attention
from lcikernels.layers.mamba import Mamba
from lcikernels.layers.mlp import MLP
from lcikernels.layers.retention import Retention
from lcikernels.layers.state import RecurrentLayer

__all__ = ["MLP", "Attention", "Mamba", "RecurrentLayer", "Retention"]
