"""Where a backend computes in tests: Triton's and CUDA's on a GPU if there is one, every other on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lcikernels.backends import TABLES

GPU = "cuda" if torch.cuda.is_available() else "cpu"


def device(backend: str) -> str:
    return GPU if backend in ("triton", "cuda") else "cpu"


def why_not(op: str, backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot compute `op` there, or None."""
    return TABLES[op][backend].why_not(torch.empty(1, dtype=dtype, device=device(backend)))


def on_device(op: Callable, backend: str) -> Callable:
    """`op` by `backend` where that computes. Arguments, outputs and gradients are on the CPU; a step's state
    is changed there."""

    def run(*arguments, **named):
        there = {name: placed(x, backend) for name, x in named.items()}
        out = op(*(placed(x, backend) for x in arguments), **there, backend=backend)
        if there.get("state") is not named.get("state"):
            named["state"].copy_(there["state"])
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    return run


def multiplied(dtype: torch.dtype) -> torch.dtype | None:
    """What retention's compiled kernels round the factors of products of this dtype to, as a GPU does."""
    library = torch.ops.lcikernels_cpp
    has = hasattr(library, "instruction_set") and library.instruction_set() in ("avx512_bf16", "amx")
    return dtype if has and dtype == torch.bfloat16 else None


def able(op: Callable, backend: str, dtype: torch.dtype = torch.float32) -> Callable:
    """`op` by `backend`, or a skip."""
    if why := why_not(op.__name__, backend, dtype):
        pytest.skip(why)
    return on_device(op, backend)


def placed(x: object, backend: str) -> object:
    """A tensor where `backend` computes; anything else as it is."""
    return x.to(device(backend)) if isinstance(x, Tensor) else x
