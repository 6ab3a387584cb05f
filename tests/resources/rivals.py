"""The same prediction for the kernels that people have: flash-linear-attention's, mamba-ssm's.

flash-linear-attention's are compiled as installed, as on a Hopper; of the tiles that it would try there, each
with the fewest stages, those count that are predicted to be the fastest. mamba-ssm's are compiled by nvcc
from sources in .rivals/ (benchmarks/rivals.py says how they come there); what its atomic additions cost is
not in it.
"""

import importlib
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from triton.runtime.autotuner import Autotuner, Config, Heuristics
from triton.runtime.jit import JITFunction

from benchmarks.rivals import NVCC, RIVALS, versions
from benchmarks.work import least

from . import code, model
from .cases import half, tensor
from .launches import Counting, Launch, replaced
from .model import H200, Launched
from .programs import Program, said

FLA_KERNELS = "fla.ops.common.chunk_h", "fla.ops.common.chunk_o"
RETNETS = (8, 4096, 8, 256, 512), (4, 2048, 16, 128, 128), (8, 1024, 8, 64, 64)
SCAN = {"B": 8, "T": 4096, "D": 2048, "N": 16}
STEPS = 2048  # tokens that mamba-ssm's 128 threads take at once
MAMBA = {"forward": ("fwd_bf16", "Li128ELi16ELi1ELb1ELb1ELb1ELb1EN3c108BFloat16EfE")}
MAMBA["backward"] = "bwd_bf16_real", "Li128ELi16ELb1ELb1ELb1ELb1ELb1EN3c108BFloat16EfE"


class Trying:
    """In a kernel's place: notes each launch with all the tiles that it would try."""

    def __init__(self, kernel: object, notes: list[list[Launch]]):
        self.kernel, self.notes, self.configs, self.rules = kernel, notes, [Config({})], []
        while not isinstance(self.kernel, JITFunction):
            if isinstance(self.kernel, Autotuner):
                tiles = sorted(self.kernel.configs, key=lambda x: -x.num_stages)
                self.configs = [*{(str(x.kwargs), x.num_warps): x for x in tiles}.values()]
            else:
                self.rules.append(self.kernel.values)
            self.kernel = self.kernel.fn

    def __getitem__(self, grid):
        return lambda **named: self.notes.append(
            [self.launch(grid, named | x.kwargs, x) for x in self.configs]
        )

    def launch(self, grid: object, named: dict[str, object], config: Config) -> Launch:
        for rules in self.rules:
            named |= {name: rule(named) for name, rule in rules.items()}
        sizes = grid(named) if callable(grid) else grid
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return Launch("", self.kernel, named, options, (*sizes, 1, 1)[:3])


def fla_launches(call: Callable[[], object]) -> tuple[list[list[Launch]], list[int]]:
    notes: list[list[Launch]] = []
    bytes: list[int] = []

    def by(_, x: object) -> object:
        return Trying(x, notes) if isinstance(x, (Autotuner, Heuristics)) else x

    with replaced([*map(importlib.import_module, FLA_KERNELS)], by), Counting(bytes):
        call()
    return notes, bytes


def fastest(tries: list[Launch]) -> Launched:
    """Of those that fit."""
    programs = [Program(launch, 90) for launch in tries]
    fit = [model.launched(x) for x in programs if x.shared <= model.MOST[90]]
    return min(fit, key=lambda x: max(model.bounds(x, H200).values()))


def of_hopper() -> ModuleType:
    """flash-linear-attention's chunks, imported again with the tiles that they would try on one."""
    import fla.utils

    fla.utils.IS_NVIDIA_HOPPER, fla.utils.check_shared_mem = True, lambda *_: True
    *_, chunk = (
        importlib.reload(importlib.import_module(x)) for x in (*FLA_KERNELS, "fla.ops.simple_gla.chunk")
    )
    return chunk


def fla_predictions() -> Iterator[dict[str, object]]:
    chunk, whose = of_hopper(), f"flash-linear-attention {versions()['fla-core']}"
    for B, T, H, K, V in RETNETS:
        q, k, v, do, rates = half(B, T, H, K), half(B, T, H, K), half(B, T, H, V), half(B, T, H, V), tensor(H)
        given = dict(q=q, k=k, v=v, g=None, g_gamma=rates, scale=0.5, initial_state=None)
        calls = {
            "forward": lambda given=given: chunk.chunk_simple_gla_fwd(**given),
            "backward": lambda given=given, do=do: chunk.chunk_simple_gla_bwd(**given, do=do, dht=None),
        }
        sizes = {"B": B, "T": T, "H": H, "K": K, "V": V}
        for (mode, call), work in zip(calls.items(), floors(sizes, (q, k, v, rates), v)):
            notes, bytes = fla_launches(call)
            yield row("retention", sizes, mode, whose, [fastest(tries) for tries in notes], bytes, work)


def floors(sizes: dict[str, int], inputs: tuple[torch.Tensor, ...], like: torch.Tensor) -> tuple:
    read, x = (sum(u.numel() * u.element_size() for u in us) for us in (inputs, (like,)))
    return least(sizes, read, x, like.numel())


def row(op, sizes, mode, whose, launches: list[Launched], torch: list[int], work) -> dict[str, object]:
    seconds, bound = model.predicted(launches, torch, H200)
    return {
        "op": op,
        "shape": " ".join(f"{name}={size}" for name, size in sizes.items()),
        "mode": mode,
        "by": whose,
        "predicted": seconds,
        "bound": bound,
        "floor": H200.floor(*work),
        "launches": len(launches),
        "torch": len(torch),
        "host": None,
    }


def mamba_predictions() -> Iterator[dict[str, object]]:
    """At whole multiples of STEPS, with z, bias and softplus: a program is a channel of a sequence."""
    (sources,) = RIVALS.glob("mamba_ssm-*/csrc/selective_scan")
    B, T, D, N = SCAN.values()
    stream, states, shared = 2 * B * T * D, 8 * B * D * ceil(T / STEPS) * N, 2 * 2 * B * T * N
    bytes = {"forward": 5 * stream + shared + states, "backward": 8 * stream + 3 * shared + states}
    x, dt, z, a, b, c, d = (
        *(half(B, T, D) for _ in range(3)),
        tensor(D, N),
        half(B, T, N),
        half(B, T, N),
        tensor(D),
    )
    works = floors(SCAN, (x, dt, z, a, b, c, d, d), x)
    for (mode, (name, function)), work in zip(MAMBA.items(), works):
        with TemporaryDirectory() as folder:
            text = said("nvdisasm", "-c", compiled(sources / f"selective_scan_{name}.cu", Path(folder)))
        instructions, spans = code.parse(code.function(text, function))
        rest, loops = code.loops(instructions, spans)
        chunk, state = loops[0], max(loops[1:], key=lambda x: len(x.own))
        times = {id(chunk): T / STEPS, id(state): T / STEPS * N}
        counts = sum((code.counts(x.own).times(times.get(id(x), 1)) for x in loops), code.counts(rest))
        whose = f"mamba-ssm {versions()['mamba-ssm']}"
        yield row("selective_scan", SCAN, mode, whose, [Launched(counts, 4, B * D, bytes[mode])], [], work)


def compiled(source: Path, folder: Path) -> str:
    """By nvcc, with mamba-ssm's own options."""
    include = Path(torch.__file__).parent / "include"
    out = folder / f"{source.stem}.cubin"
    options = [*NVCC, "-std=c++20", "-arch=sm_90", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    options += [
        f"-I{x}" for x in (include, include / "torch/csrc/api/include", sysconfig.get_path("include"))
    ]
    subprocess.run(["nvcc", "-cubin", *options, source, "-o", out], check=True)
    return str(out)
