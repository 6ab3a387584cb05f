"""What a run of the demo ran on."""

import os
import platform
import time
from pathlib import Path

import torch
import transformers

import growth


def machine() -> dict:
    """By what, besides the job, a figure of time may differ."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "growth": growth.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def processor() -> str:
    """The processor's name, which Linux keeps in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
