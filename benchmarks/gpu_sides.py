"""The sides that are compared on a GPU: our ops in Triton and CUDA, and what people have for the same today.

mamba-ssm, causal-conv1d and flash-linear-attention, whose kernels are fla-core's, are taken as installed, or
from their sources in .rivals/, which git ignores:

    export MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE
    pip download --no-deps --no-build-isolation --no-binary :all: -d .rivals mamba-ssm causal-conv1d
    for x in .rivals/*.tar.gz; do tar xzf $x -C .rivals; done
    pip download --no-deps -d .rivals fla-core einops
    for x in .rivals/*.whl; do unzip -q $x -d ${x%-py3*}; done
    python -m benchmarks.gpu_sides          compiles what a benchmark needs, and says what is there
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, cycle
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu
from benchmarks.shapes import Work, expansion_work, fewest
from benchmarks.sides import (
    EXPANSIONS,
    HEADS_FIRST,
    conv_inputs,
    expansion_inputs,
    log_decay,
    new_units_alone,
    norm_inputs,
    scan,
    scan_inputs,
    scan_reference,
    step,
    step_inputs,
    step_reference,
)
from lcikernels import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    kronecker_expand,
    retention,
    retention_step,
)
from lcikernels.compat.causal_conv1d import causal_conv1d_fn
from lcikernels.compat.mamba_ssm import selective_scan_fn
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as causal_conv1d_reference
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as gated_rms_norm_reference
from lcikernels.ops.kronecker_expand.reference import kronecker_expand as kronecker_expand_reference
from lcikernels.ops.retention.reference import retention as retention_reference

RIVALS = Path(__file__).parents[1] / ".rivals"
SOURCES = {
    "selective_scan_cuda": (
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
SCAN, UPDATE = "selective_scan_cuda", "mamba_ssm.ops.triton.selective_state_update"
CONV, FLA = "causal_conv1d.causal_conv1d_interface", "fla.ops.retention"
RETNET = {"B": 8, "T": 4096, "H": 8, "K": 256, "V": 512}
PUBLISHED = [  # flash-linear-attention's table of B, T, H, K = V, but for 256; the one for its tiles first
    {"B": B, "T": T, "H": H, "K": D, "V": D}
    for B, T, H, D in (
        (4, 4096, 64, 128), (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (8, 1024, 8, 64)
    )
]  # fmt: skip
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


def compiled(name: str) -> ModuleType:
    """By all cores, for the GPU that is here alone: each other one would take as long."""
    from torch.utils.cpp_extension import load

    folder, files = SOURCES[name]
    folder = next(RIVALS.glob(folder))
    build = RIVALS / "build" / name
    build.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] += f":{Path(sys.executable).parent}"  # ninja
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # kernels for other types are missing, and never called
    try:
        sys.modules[name] = load(
            name,
            [f"{for_bfloat16(folder / file, build)}" for file in files],
            extra_cflags=["-O3"],
            extra_cuda_cflags=NVCC,
            extra_ldflags=["-Wl,-z,lazy"],
            extra_include_paths=[f"{folder}"],
            build_directory=f"{build}",
        )
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
    for size in sizes:
        with torch.device(gpu.DEVICE):
            inputs = retention_inputs(**size | {"T": 128})
        heads = {name: inputs[name].bfloat16().requires_grad_() for name in HEADS_FIRST}
        found(FLA).chunk_retention(**heads)[0].sum().backward()


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
    """What is installed of what is compared, and what lies in .rivals/."""
    lying = (x.name.split("-", 1) for x in RIVALS.glob("*-*") if x.is_dir())
    there = {name.replace("_", "-"): number for name, number in lying}
    for name in ("torch", "triton", "mamba-ssm", "causal-conv1d", "fla-core"):
        with suppress(PackageNotFoundError):
            there[name] = version(name)
    return there


class Side(NamedTuple):
    """`run(**inputs)` is the output.

    swapped: as in sides.py. ours: it is one of our ops. needs: the module of the rival that it calls.
    bounds: of T tokens, where it takes one row for packed sequences. state: the dtype of a step's state.
    tuned: to the first sizes that it sees, so they are sizes that are timed. other: it computes another
    function, whose answer is not compared.
    """

    run: Callable[..., Tensor]
    swapped: tuple[str, ...] = ()
    ours: bool = False
    needs: str | None = None
    bounds: Callable[[int], tuple[int, ...]] | None = None
    state: torch.dtype = torch.float32
    tuned: bool = False
    other: bool = False


class Op(NamedTuple):
    """`inputs(**sizes)` are float32, `reference(**inputs)` is as precise as they are.

    like: the input that outputs are like, or what makes one of all inputs. products: what is multiplied is
    rounded to this dtype. work: forward's and backward's, where bench_gpu.py does not reckon it from sizes.
    """

    inputs: Callable[..., dict[str, Tensor]]
    reference: Callable[..., Tensor]
    sides: dict[str, Side]
    like: str | Callable[..., Tensor] = "x"
    products: torch.dtype | None = None
    work: Callable[..., tuple[Work, Work]] | None = None

    def output(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the output of these inputs is like."""
        return inputs[self.like] if isinstance(self.like, str) else self.like(**inputs)


class CudaScan(torch.autograd.Function):
    """mamba-ssm's, all [B, D, T]; b, c [B, N, T]. Softplus, bias, skip and gate are fused."""

    @staticmethod
    def forward(ctx, x, dt, a, b, c, d, z, dt_bias):
        inputs = x, dt, a, b[:, None], c[:, None], d, z, dt_bias
        ungated, states, y = found(SCAN).fwd(*inputs, True)
        ctx.save_for_backward(*inputs, states, ungated)
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, states, ungated = ctx.saved_tensors
        dx, ddt, da, db, dc, dd, dbias, dz = found(SCAN).bwd(*inputs, dy, states, ungated, None, True, False)
        return dx, ddt, da, db.squeeze(1), dc.squeeze(1), dd, dz, dbias


def cuda_scan(x, dt, a, b, c, d, z, dt_bias) -> Tensor:
    return CudaScan.apply(x, dt, a, b, c, d, z, dt_bias)


def channels_first_scan(x, dt, a, b, c, d, z, dt_bias) -> Tensor:
    """Ours, called as mamba-ssm's is."""
    return selective_scan_fn(x, dt, a, b, c, d, z, dt_bias, delta_softplus=True)


@cache
def bounds_of(T: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Sequences of these lengths, again and again; the last is cut at T."""
    ends = []
    for end in accumulate(cycle(lengths)):
        ends.append(min(end, T))
        if end >= T:
            return (0, *ends)


def mixed(T: int) -> tuple[int, ...]:
    return bounds_of(T, (700, 64, 2500, 1, 333, 1100, 90, 4096))


def eighths(T: int) -> tuple[int, ...]:
    return bounds_of(T, (T // 8,))


@cache
def on(device: torch.device, bounds: tuple[int, ...]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def packed(x, **inputs) -> Tensor:
    return scan(x, **inputs, cu_seqlens=on(x.device, mixed(x.shape[1])), backend="triton")


def in_rows(**inputs) -> Tensor:
    """[1, T, ...] as 8 rows."""
    rows = {name: u.unflatten(1, (8, -1))[0] if u.dim() == 3 else u for name, u in inputs.items()}
    return scan(**rows, backend="triton").flatten(0, 1)[None]


def state_update(x, dt, a, b, c, d, z, dt_bias, state) -> Tensor:
    update = found(UPDATE).selective_state_update
    return update(state, x, dt, a, b, c, d, z=z, dt_bias=dt_bias, dt_softplus=True)


def cuda_conv(x, weight, bias) -> Tensor:
    return found(CONV).causal_conv1d_fn(x, weight, bias, activation="silu")


def cuda_conv_step(x, weight, bias, state) -> Tensor:
    return found(CONV).causal_conv1d_update(x, state, weight, bias, "silu")


def channels_first_conv(x, weight, bias) -> Tensor:
    return causal_conv1d_fn(x, weight, bias, activation="silu")


def conv(**inputs) -> Tensor:
    return causal_conv1d(**inputs, activation="silu")


def conv_step(**inputs) -> Tensor:
    return causal_conv1d_step(**inputs, activation="silu")


def conv_step_inputs(B: int, D: int, W: int) -> dict[str, Tensor]:
    inputs = conv_inputs(False, B, 1, D, W)
    return inputs | dict(x=inputs["x"][:, 0], state=torch.randn(B, D, W - 1))


def conv_step_reference(x, weight, bias, state) -> Tensor:
    options = dict(activation="silu", initial_state=state)
    return causal_conv1d_reference(x[:, None], weight, bias, **options)[:, 0]


def retention_inputs(B: int, T: int, H: int, K: int, V: int, G: int | None = None) -> dict[str, Tensor]:
    """RetNet's, with its constant decays [H]. G: Mamba-2's, G heads of q and k, learned decays [B, T, H]."""
    q, k, v = torch.randn(B, T, G or H, K), torch.randn(B, T, G or H, K), torch.randn(B, T, H, V)
    if not G:
        return dict(q=q, k=k, v=v, log_decay=log_decay(H).to(q.device))
    dt = torch.empty(B, T, H).uniform_(-6.9, -2.3).exp()
    return dict(q=q, k=k, v=v, log_decay=-dt * torch.empty(H).uniform_(1, 16))


def learned(name: str, u: Tensor) -> bool:
    """RetNet's decays are not, nor LiGO's old layers."""
    return (name != "log_decay" or u.dim() == 3) and (name != "weight" or u.dim() < 3)


def fla_retention(q, k, v, log_decay) -> Tensor:
    """It has RetNet's decays, and no others."""
    return found(FLA).chunk_retention(q, k, v)[0]


def attention(q, k, v, log_decay) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def retention_step_inputs(B: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    inputs = retention_inputs(B, 1, H, K, V)
    token = {name: inputs[name][:, 0] for name in HEADS_FIRST}
    return token | dict(log_decay=inputs["log_decay"], state=torch.randn(B, H, K, V))


def retention_step_reference(q, k, v, log_decay, state) -> Tensor:
    return retention_reference(q[:, None], k[:, None], v[:, None], log_decay, initial_state=state)[:, 0]


def added_units(**sizes: int) -> dict[str, Tensor]:
    inputs = expansion_inputs(False, **sizes)
    return inputs | dict(weight=inputs["weight"].bfloat16())


def dense_maps(M: int, N: int, **sizes: int) -> dict[str, Tensor]:
    """write [M, m] and read [N, n], of all units."""
    return added_units(M=M + sizes["m"], N=N + sizes["n"], **sizes)


def expanded(added: bool, weight, write, read, depth) -> Tensor:
    m, n = weight.shape[1:]
    return weight.new_empty(len(depth), len(write) + m * added, len(read) + n * added)


def dense_work(L1: int, L2: int, m: int, n: int, M: int, N: int) -> tuple[Work, Work]:
    """Both sides, the cheaper first, of the mixed old layers, or of the old ones and then the mix, whichever
    is less; the backward has h = grad read, s = writeᵀ grad, one product each for both maps and the mix, and
    depth's besides."""
    small, large = m * n, M * N
    read, out = 2 * (L1 * small + M * m + N * n), 2 * L2 * large
    forward = min(M * n * (m + N), N * m * (n + M))
    backward = large * (m + n) + small * (M + N + min(M, N))
    mixes, orders = L1 * L2, ((small, L2), (large, L1))
    return (
        Work(read + out, fewest(mixes, forward, orders)),
        Work(2 * read + out, fewest(2 * mixes, backward, orders)),
    )


def ours(op: Callable, kernels: str = "triton") -> dict[str, Side]:
    return {
        "ours": Side(partial(op, backend=kernels), ours=True),
        "ours in torch": Side(partial(op, backend="torch"), ours=True),
    }


SCANS = ours(scan) | {
    "ours, packed": Side(packed, ours=True, bounds=mixed),
    "ours, 8 rows": Side(in_rows, ours=True, bounds=eighths),
    "ours, [B, D, T]": Side(channels_first_scan, ("x", "dt", "b", "c", "z"), ours=True),
    "mamba-ssm": Side(cuda_scan, ("x", "dt", "b", "c", "z"), needs=SCAN),
}
FORMULATIONS = {name: Side(side.run) for name, side in EXPANSIONS.items() if not side.ours}
RETENTIONS = ours(retention) | {
    "flash-linear-attention": Side(fla_retention, needs=FLA, tuned=True),
    "causal attention": Side(attention, HEADS_FIRST, other=True),
}
OPS = {
    "selective_scan": Op(partial(scan_inputs, True), scan_reference, SCANS),
    "selective_scan_step": Op(
        partial(step_inputs, True),
        step_reference,
        ours(step) | {"mamba-ssm": Side(state_update, needs=UPDATE)},
    ),
    "causal_conv1d": Op(
        partial(conv_inputs, False),
        partial(causal_conv1d_reference, activation="silu"),
        ours(conv)
        | {
            "ours, [B, D, T]": Side(channels_first_conv, ("x",), ours=True),
            "causal-conv1d": Side(cuda_conv, ("x",), needs=CONV),
        },
    ),
    "gated_rms_norm": Op(partial(norm_inputs, False), gated_rms_norm_reference, ours(gated_rms_norm)),
    "causal_conv1d_step": Op(
        conv_step_inputs,
        conv_step_reference,
        ours(conv_step) | {"causal-conv1d": Side(cuda_conv_step, needs=CONV, state=torch.bfloat16)},
    ),
    "retention": Op(retention_inputs, retention_reference, RETENTIONS, "v", torch.bfloat16),
    "retention_step": Op(retention_step_inputs, retention_step_reference, ours(retention_step), "v"),
    "kronecker_expand": Op(
        added_units,
        new_units_alone,
        ours(partial(kronecker_expand, added=True), "cuda") | FORMULATIONS,
        partial(expanded, True),
        work=partial(expansion_work, 2, False),
    ),
    "kronecker_expand, dense maps": Op(
        dense_maps,
        kronecker_expand_reference,
        ours(kronecker_expand, "cuda"),
        partial(expanded, False),
        work=dense_work,
    ),
}

if __name__ == "__main__":
    for rival in (SCAN, CONV, UPDATE, FLA):
        module = found(rival)
        print(f"{rival}: {module if isinstance(module, str) else 'there'}")
    if isinstance(found(FLA), ModuleType) and torch.cuda.is_available():
        compile_retentions()
