"""Rivals that must be found, or compiled: packages as installed, or from their sources.

mamba-ssm, causal-conv1d and flash-linear-attention, whose kernels are fla-core's, may lie in .rivals/, which
git ignores:

    export MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE
    pip download --no-deps --no-build-isolation --no-binary :all: -d .rivals mamba-ssm causal-conv1d
    for x in .rivals/*.tar.gz; do tar xzf $x -C .rivals; done
    pip download --no-deps -d .rivals fla-core einops
    for x in .rivals/*.whl; do unzip -q $x -d ${x%-py3*}; done
    python -m benchmarks.rivals             compiles what a benchmark needs, and says what is there
"""

import os
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from types import ModuleType

import torch

from benchmarks.cases import PUBLISHED, RETNET, TRAINING

RIVALS = Path(__file__).parents[1] / ".rivals"
SCAN, UPDATE = "selective_scan_cuda", "mamba_ssm.ops.triton.selective_state_update"
CONV, FLA = "causal_conv1d.causal_conv1d_interface", "fla.ops.retention"
SOURCES = {
    SCAN: (
        "mamba_ssm-*/csrc/selective_scan",
        ["selective_scan.cpp", "selective_scan_fwd_bf16.cu", "selective_scan_bwd_bf16_real.cu"],
    ),
    "causal_conv1d_cuda": (
        "causal_conv1d-*/csrc",
        ["causal_conv1d.cpp", "causal_conv1d_fwd.cu", "causal_conv1d_bwd.cu", "causal_conv1d_update.cu"],
    ),
}
NVCC = ["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]  # as they do
NVCC += [f"-U__CUDA_NO_{x}__" for x in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]
NVCC += [f"-U__CUDA_NO_{x}__" for x in ("BFLOAT16_OPERATORS", "BFLOAT162_OPERATORS", "BFLOAT162_CONVERSIONS")]
COMPILING = 200  # seconds, at most, while the tests run


@cache
def found(name: str) -> ModuleType | str:
    """A rival's module as installed or from .rivals/, or why it is not there."""
    try:
        return import_module(name)
    except ImportError as why:
        not_installed = f"{name} is not installed ({why})"
    try:
        if name == FLA:
            return from_wheels(name)
        return compiled(name) if name in SOURCES else without_its_package(name)
    except StopIteration:
        return f"{not_installed}, and {RIVALS.name}/ has no sources of it"
    except Exception as why:  # of a rival's build anything may come; the benchmark of the others goes on
        return f"{not_installed}, and its sources fail: {why}"


def why_not(needed: str | None) -> str | None:
    """Why a side that needs this module cannot run here, in one line, or None."""
    module = needed and found(needed)
    return module.partition("\n")[0] if isinstance(module, str) else None


def compiled(name: str) -> ModuleType:
    """By all cores, for the GPU that is here alone: each other one would take as long."""
    from torch.utils.cpp_extension import load

    folder, files = SOURCES[name]
    folder, build = next(RIVALS.glob(folder)), RIVALS / "build" / name
    build.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] += f":{Path(sys.executable).parent}"  # ninja
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    sources = [f"{for_bfloat16(folder / file, build)}" for file in files]
    options = dict(extra_cflags=["-O3"], extra_cuda_cflags=NVCC, extra_ldflags=["-Wl,-z,lazy"])
    options |= dict(extra_include_paths=[f"{folder}"], build_directory=f"{build}")
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # kernels for other types are missing, and never called
    try:
        sys.modules[name] = load(name, sources, **options)
    finally:
        sys.setdlopenflags(flags)
    return sys.modules[name]


def for_bfloat16(source: Path, build: Path) -> Path:
    """A copy that has kernels for bfloat16 with float32 parameters alone. With all types the convolution's
    backward takes 4 minutes."""
    lines = source.read_text().splitlines(keepends=True)
    kept = [x for x in lines if not x.startswith("template void ") or "<at::BFloat16, float>" in x]
    copy, text = build / source.name, "".join(kept)
    if not copy.exists() or copy.read_text() != text:  # a newer one would be compiled again
        copy.write_text(text)
    return copy


def without_its_package(name: str) -> ModuleType:
    """A module of plain Python; its package's __init__ would import far more."""
    top = name.partition(".")[0]
    package = ModuleType(top)
    package.__path__ = [f"{next(RIVALS.glob(f'{top}-*/{top}'))}"]
    if top == "causal_conv1d":
        compiled("causal_conv1d_cuda")
    sys.modules[top] = package
    return import_module(name)


def from_wheels(name: str) -> ModuleType:
    """A module whose package is imported with it. What is installed comes first."""
    packages = next(RIVALS.glob("fla_core-*/fla")), *RIVALS.glob("einops-*/einops")
    sys.path += [f"{package.parent}" for package in packages]
    return import_module(name)


def compile_retention(sizes: list[dict[str, int]]) -> None:
    """For Triton's cache: of a head size flash-linear-attention tries 160 kernels, one after another."""
    from benchmarks.answers import OPS, drawn, prepared

    side = OPS["retention"].on_gpu["flash-linear-attention"]
    for size in sizes:
        prepared("retention", drawn("retention", size | {"T": 128}, side), side, TRAINING)()


def compile_retentions() -> None:
    """All head sizes at once. Which kernel is the best is not kept: the tests have the GPU meanwhile."""
    os.environ["FLA_CACHE_RESULTS"] = "0"
    until, spawn = monotonic() + COMPILING, get_context("spawn")
    alike: dict[tuple[int, int], list[dict[str, int]]] = {}
    for size in (RETNET, *PUBLISHED):
        alike.setdefault((size["K"], size["V"]), []).append(size)
    processes = [spawn.Process(target=compile_retention, args=(sizes,)) for sizes in alike.values()]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0, until - monotonic()))
        process.kill()


def versions() -> dict[str, str]:
    """What is installed of what is compared on a GPU, and what lies in .rivals/."""
    lying = (x.name.split("-", 1) for x in RIVALS.glob("*-*") if x.is_dir())
    there = {name.replace("_", "-"): number for name, number in lying}
    for name in ("torch", "triton", "mamba-ssm", "causal-conv1d", "fla-core"):
        with suppress(PackageNotFoundError):
            there[name] = version(name)
    return there


if __name__ == "__main__":
    for rival in (SCAN, CONV, UPDATE, FLA):
        print(f"{rival}: {why_not(rival) or 'there'}")
    if not why_not(FLA) and torch.cuda.is_available():
        compile_retentions()
