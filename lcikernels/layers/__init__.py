"""Sequence mixers of linear cost as plain modules: Mamba, Mamba-2, retention, lightning attention."""

from lcikernels.layers.layer import State
from lcikernels.layers.lightning import LightningAttention
from lcikernels.layers.mamba import Mamba
from lcikernels.layers.mamba2 import Mamba2
from lcikernels.layers.retention import Retention

__all__ = ["LightningAttention", "Mamba", "Mamba2", "Retention", "State"]
