"""The compiled library: loaded once, on import. Where that fails, the reason is kept."""

import sys
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_C.so")
BUILD = "pip install --no-build-isolation -e ."


def load(library: Path) -> str | None:
    """Enter the library's ops as `torch.ops.lcikernels_cpp`; returns why that is not possible, or None."""
    if not library.exists():
        return missing(library)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} does not load: {error}"
    return None


def missing(library: Path) -> str:
    """What helps: a folder of sources hides what was installed from it, for Python finds it first."""
    for folder in sys.path:
        if (installed := Path(folder, *library.parts[-2:])).exists():
            here = f"{library.parent} is not compiled, and hides {installed.parent}, which is"
            return f"{here}: start Python in another folder, or compile this one: {BUILD}"
    return f"not compiled: LCIKERNELS_BUILD=cpu {BUILD} says what is missing"


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


def on_cuda(op: str, x: Tensor) -> str | None:
    """Why the compiled CUDA kernels of `op` cannot compute with activations like `x`, or None."""
    if WHY_NOT:
        return WHY_NOT
    if not has_cuda(op):
        return (
            "not compiled: LCIKERNELS_BUILD=cuda pip install --no-build-isolation -e . says what is missing"
        )
    if x.device.type != "cuda":
        return f"it runs on a GPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, x is {x.dtype}"
    return too_old(x.device.index)


@torch.compiler.assume_constant_result  # what torch.compile cannot trace, and need not
def has_cuda(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lcikernels_cpp::{op}", "CUDA")


@torch.compiler.assume_constant_result
def too_old(gpu: int) -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability(gpu) < (8, 0):
        return f"it needs a GPU of compute capability 8.0, x is on {torch.cuda.get_device_name(gpu)}"
    return None
