"""The parts of a block: four mixers, the MLP, and the cache layer that keeps a mixer's state.

They need transformers: pip install lcikernels[growth].
"""

from lcikernels.layers.attention import Attention
from lcikernels.layers.mamba import Mamba
from lcikernels.layers.mamba2 import Mamba2
from lcikernels.layers.mlp import MLP
from lcikernels.layers.retention import Retention
from lcikernels.layers.state import RecurrentLayer

__all__ = ["MLP", "Attention", "Mamba", "Mamba2", "RecurrentLayer", "Retention"]
