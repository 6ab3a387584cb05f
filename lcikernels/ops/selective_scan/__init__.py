"""The selective scan: Mamba's mixer."""

from .op import selective_scan
from .segment import selective_scan_segment
from .step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_segment", "selective_scan_step"]
