"""The gated RMS norm: what RetNet and Mamba-2 put between the mixer and its output projection."""

from .op import gated_rms_norm

__all__ = ["gated_rms_norm"]
