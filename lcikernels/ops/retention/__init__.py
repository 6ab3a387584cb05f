"""Retention: RetNet's mixer, and with one decay per token Mamba-2's."""

from .op import retention
from .segment import retention_segment
from .step import retention_step

__all__ = ["retention", "retention_segment", "retention_step"]
