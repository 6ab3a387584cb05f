"""The ops. Each folder: op.py (the contract), reference.py (the paper), and one module for each backend."""

from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .gated_rms_norm import gated_rms_norm
from .kronecker_expand import kronecker_expand
from .retention import retention, retention_segment, retention_step
from .selective_scan import selective_scan, selective_scan_segment, selective_scan_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "gated_rms_norm",
    "kronecker_expand",
    "retention",
    "retention_segment",
    "retention_step",
    "selective_scan",
    "selective_scan_segment",
    "selective_scan_step",
]
