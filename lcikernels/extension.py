"""The compiled library: loaded once, on import. Where that fails, the reason is kept."""

from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_C.so")


def load(library: Path) -> str | None:
    """Enter the library's ops as `torch.ops.lcikernels_cpp`; returns why that is not possible, or None."""
    if not library.exists():
        return "not compiled: LCIKERNELS_BUILD=cpu pip install --no-build-isolation . says what is missing"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} does not load: {error}"
    return None


WHY_NOT = load(LIBRARY)


def on_cpu(x: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot compute with activations like `x`, or None."""
    if WHY_NOT:
        return WHY_NOT
    if x.device.type != "cpu":
        return f"it runs on a CPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"it takes float32, float64 and bfloat16, x is {x.dtype}"
    return None
