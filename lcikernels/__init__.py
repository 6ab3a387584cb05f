"""Kernels for models whose inference cost is linear: retention, the selective scan, and what stands around
them; and for growing models.

Importing this touches no GPU and no Triton.
"""

from .ops import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    kronecker_expand,
    retention,
    retention_segment,
    retention_step,
    selective_scan,
    selective_scan_segment,
    selective_scan_step,
)
from .ops.checks import checked

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "checked",
    "gated_rms_norm",
    "kronecker_expand",
    "retention",
    "retention_segment",
    "retention_step",
    "selective_scan",
    "selective_scan_segment",
    "selective_scan_step",
]
