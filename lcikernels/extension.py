"""The compiled library: loaded once, on import; where that fails, the reason is kept and nothing else changes."""

from pathlib import Path

import torch
from torch import Tensor


def _load(path: Path) -> str | None:
    if not path.exists():
        return "not compiled: install g++ and ninja, then pip install --no-build-isolation . (LCIKERNELS_BUILD=cpu says why not)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


WHY_NOT = _load(Path(__file__).with_name("_C.so"))


def on_cpu(x: Tensor) -> str | None:
    """Why the compiled CPU kernels cannot compute with activations like `x`, or None."""
    if WHY_NOT:
        return WHY_NOT
    if x.device.type != "cpu":
        return f"it runs on a CPU, x is on {x.device}"
    if x.dtype != torch.float32:
        return f"it computes in float32 only, x is {x.dtype}"
    return None
