"""The only place that decides who computes.

Each op has a table of backends, best first. `choose` walks it; `load` imports the module that computes, on
first use, so that importing the package touches neither Triton nor a GPU. To add a backend is to add a line
to the op's table.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Backend(NamedTuple):
    """A module that computes one op, and why it cannot for tensors like `x` (dtype and device), or None."""

    module: str
    why_not: Callable[[Tensor], str | None]


TABLES: dict[str, dict[str, Backend]] = {}
HAS_TRITON = find_spec("triton") is not None


def anywhere(x: Tensor) -> str | None:
    """Plain torch runs on every device."""
    return None


def with_float64(x: Tensor) -> str | None:
    """Plain torch that needs float64 runs on every device but Apple's."""
    return f"it sums in float64, which {x.device} does not have" if x.device.type == "mps" else None


def on_gpu(x: Tensor) -> str | None:
    """Triton kernels run on a GPU, and under Triton's interpreter (TRITON_INTERPRET=1) on a CPU."""
    if not HAS_TRITON:
        return "Triton is not installed: pip install triton"
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type != "cuda" and not interpreted:
        return f"it runs on a GPU, x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, x is {x.dtype}"
    return None


def on_gpu_with_products(x: Tensor) -> str | None:
    """Triton's interpreter gets matrix products of bfloat16 wrong."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return f"Triton's interpreter has no bfloat16 products, x is on {x.device}"
    return on_gpu(x)


def table(op: str, backends: dict[str, Backend]) -> None:
    """Enter the backends of `op`, best first."""
    TABLES[op] = backends


def choose(op: str, wanted: str | None, x: Tensor) -> str:
    """The name of the backend that computes `op` for `x`: the wanted one, or the best that can.

    Raises RuntimeError where the wanted one cannot run or does not exist, or where none can run.
    """
    backends = TABLES[op]
    if wanted is None:
        for name, backend in backends.items():
            if backend.why_not(x) is None:
                return name
        reasons = "; ".join(f"{name!r}: {backend.why_not(x)}" for name, backend in backends.items())
        raise RuntimeError(f"{op}: no backend can run here: {reasons}")
    if not isinstance(wanted, str) or wanted not in backends:
        raise RuntimeError(
            f"{op}: there is no backend {wanted!r}; there are {', '.join(map(repr, backends))}"
        )
    if why := backends[wanted].why_not(x):
        raise RuntimeError(f"{op}: backend {wanted!r} cannot run here: {why}")
    return wanted


def hand_over(op: str, part: str) -> Callable:
    """A function whose last argument names a backend of `op`; the others go to that backend's `part`."""

    def run(*arguments):
        *inputs, name = arguments
        return getattr(load(op, name), part)(*inputs)

    return run


@cache
def outlive_forks() -> None:
    """From the first op on, a child that is forked computes on one thread: OpenMP's others are not in it, and
    whatever torch then shares out waits for them for ever."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


@cache
def load(op: str, name: str) -> ModuleType:
    """The module behind a backend; it has the op's `forward` and `backward`, or `step`."""
    outlive_forks()
    return importlib.import_module(TABLES[op][name].module)
