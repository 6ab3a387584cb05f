"""The selective scan: Mamba's mixer."""

from .op import selective_scan
from .step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
