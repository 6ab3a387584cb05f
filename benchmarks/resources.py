"""What the Triton kernels take on each GPU, without one: registers, spills, shared memory, instructions.

    python -m benchmarks.resources           every configuration that the launchers choose, 5 minutes
    ... "N=16 bfloat16" all                  those in whose name these regular expressions are found

The launchers run with kernels that only note their arguments; then these are compiled as a launch would, for
AMD's GPU too. The last column: issue slots of a lane for each channel, state and token of the scan.
"""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lcikernels.ops import views
from lcikernels.ops.causal_conv1d import kernel as conv
from lcikernels.ops.gated_rms_norm import kernel as norm
from lcikernels.ops.retention import kernel as retention
from lcikernels.ops.retention import launch as retaining
from lcikernels.ops.selective_scan import kernel as scan

NVIDIA = (80, 90, 100)
AMD = GPUTarget("hip", "gfx942", 64)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Launch(NamedTuple):
    """A kernel with the arguments and options of one launch; what: which case of its op."""

    what: str
    kernel: JITFunction
    arguments: dict
    options: dict


class Resources(NamedTuple):
    """Of one kernel on one GPU: of a thread, in bytes, in bytes; slots: see above, None elsewhere."""

    registers: int
    stack: int
    shared: int
    slots: float | None


class Noting:
    """In a kernel's place: notes launches."""

    def __init__(self, kernel: JITFunction, what: str, notes: list[Launch]):
        self.kernel, self.what, self.notes = kernel, what, notes

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            named = dict(zip(self.kernel.arg_names, arguments))
            self.notes.append(Launch(self.what, self.kernel, named, options))

        return launch


def launches(module: ModuleType, what: str, call) -> list[Launch]:
    """Every launch of `call`, which uses the kernels in `module` and copies."""
    both = (module, views)
    kernels = [(m, name, x) for m in both for name, x in vars(m).items() if name.endswith("_kernel")]
    notes: list[Launch] = []
    for m, name, kernel in kernels:
        setattr(m, name, Noting(kernel, what, notes))
    try:
        call()
    finally:
        for m, name, kernel in kernels:
            setattr(m, name, kernel)
    return notes


def source(launch: Launch, target: GPUTarget) -> ASTSource:
    """The kernel specialized as the launch would, by what Triton itself calls then."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, _ = bind(**launch.arguments)
    options = options_for(launch, target)
    _, *specialized = kernel._pack_args(backend, options, arguments, specialization, options)
    return ASTSource(kernel, *specialized)


def options_for(launch: Launch, target: GPUTarget) -> dict:
    return {k: v for k, v in launch.options.items() if k != "maxnreg" or target.backend == "cuda"}


def compiled(launch: Launch, target: GPUTarget):
    return triton.compile(source(launch, target), target=target, options=options_for(launch, target))


def resources(launch: Launch, sm: int) -> Resources:
    program = compiled(launch, GPUTarget("cuda", sm, 32))
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        usage = said("cuobjdump", "--dump-resource-usage", file.name)
        spent = slots(launch, loops(said("nvdisasm", "-c", file.name))) if walks(launch) else None
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Resources(registers, stack, program.metadata.shared, spent)


def said(tool: str, *arguments: str) -> str:
    """By one of NVIDIA's tools that come with Triton."""
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def loops(code: str) -> list[int]:
    """Instructions of each innermost loop: from a label to the branch back to it, NOPs apart."""
    labels, found, count = {}, [], 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)(.*);", line):
            count += instruction[1] != "NOP"
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1] == "BRA" and target and target[0] in labels:
                found.append((labels[target[0]], count))
    found = [(start, end) for start, end in found if end - start > 1]
    inner = [x for x in found if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in found)]
    return sorted((end - start for start, end in inner), reverse=True)


def walks(launch: Launch) -> int:
    """How often a kernel of the scan walks the tokens; 0 of any other."""
    times = {"forward_kernel": 1, "backward_kernel": 2}.get(launch.kernel.__name__, 0)
    return times if "fixed" in launch.arguments else 0


def slots(launch: Launch, loops: list[int]) -> float:
    """Of the scan, by its longest loops."""
    sizes, times = launch.arguments["fixed"], walks(launch)
    states = sizes.BN * sizes.BD * (sizes.AHEAD if times == 1 else sizes.STEPS)
    return sum(loops[:times]) * 32 * launch.options["num_warps"] / states


def along(tokens: bool, T: int, X: int, dtype: torch.dtype) -> Tensor:
    """[1, T, X] whose tokens, or else whose channels, lie beside each other."""
    return torch.zeros(1, X, T, dtype=dtype).mT if tokens else torch.zeros(1, T, X, dtype=dtype)


def scan_launches(
    N: int, dtype: torch.dtype, full: bool, segments: int, tokens: bool = False
) -> list[Launch]:
    """Forward, backward and step; with all that is optional or with nothing.

    tokens: what lies along them, and z is half of a projection.
    """
    T, D = 64 if tokens else 4, 64
    x, b = along(tokens, T, D, dtype), along(tokens, T, N, dtype)
    a, d, state = torch.zeros(D, N), torch.zeros(D), torch.zeros(2, D, N)
    z, bounds = torch.zeros(1, T, 2 * D, dtype=dtype)[..., D:] if tokens else x, torch.tensor([0, 1, T]).int()
    if not full:
        d = z = state = bounds = None
    inputs = x, x, a, b, b, d, z, d, full, state, bounds
    token = (u if u is None or u.dim() < 3 else u[:, 0] for u in (x, x, a, b, b, d, z, d))
    checkpoints, final = torch.zeros(1, D, N), torch.zeros(2 if full else 1, D, N)
    states, rows = (final.to(dtype), torch.zeros(1, dtype=torch.int32)) if full else (final, None)

    def call() -> None:
        scan.forward(*inputs, scan.CHUNK)
        scan.backward(x, final, *inputs, checkpoints, scan.CHUNK)
        scan.step(*token, full, states, rows)
        scan.crossing(x, x, a, b, d, full)
        scan.crossing_back(x, x, a, b, z, d, full)

    case = f"N={N} {str(dtype)[6:]}, {'all' if full else 'bare'}"
    case += ", in segments" * (segments > 1) + ", [B, D, T]" * tokens
    scan.cut, cut = lambda *_: T // segments, scan.cut
    try:
        return launches(scan, f"selective_scan {case}", call)
    finally:
        scan.cut = cut


def conv_launches(W: int, dtype: torch.dtype, full: bool, tokens: bool = False) -> list[Launch]:
    """Forward, backward and step; with all that is optional or with nothing; in one layout or the other."""
    T, D = 64 if tokens else 4, 64
    x, weight = along(tokens, T, D, dtype), torch.zeros(D, W)
    bias, state, bounds = torch.zeros(D), torch.zeros(2, D, W - 1), torch.tensor([0, 1, T], dtype=torch.int32)
    filters = (weight, bias, "silu") if full else (weight, None, None)
    states = (state, bounds) if full else (None, None)
    cache = (state.to(dtype), bounds[:1], bounds[:1].long()) if full else (state[:1], None, None)

    def call() -> None:
        conv.forward(x, *filters, *states)
        conv.backward(x, state if full else None, x, *filters, *states)
        conv.step(x[:, 0], *filters, *cache)

    case = f"W={W} {str(dtype)[6:]}, {'all' if full else 'bare'}" + ", [B, D, T]" * tokens
    return launches(conv, f"causal_conv1d {case}", call)


def norm_launches(D: int, dtype: torch.dtype, kind: str, gate: str) -> list[Launch]:
    """Forward and backward of two groups with weight and bias. gate: where it is; bare: nothing but x;
    Mamba-2: as there, in one group without a bias."""
    x, options = torch.zeros(8, 2 * D, dtype=dtype), (gate == "after", "silu", kind)
    inputs, groups = (x, x, *torch.zeros(2, 2 * D)), 2
    if gate == "bare":
        inputs = (x, None, None, None)
    elif gate == "Mamba-2":
        inputs, groups = (x[:, :D], x[:, :D], torch.zeros(D), None), 1

    def call() -> None:
        norm.forward(*inputs, 1e-5, groups, *options)
        norm.backward(inputs[0], *inputs, 1e-5, groups, *options)

    return launches(norm, f"gated_rms_norm D={D} {str(dtype)[6:]}, {kind}, {gate}", call)


def retention_launches(K: int, V: int, dtype: torch.dtype, kind: str) -> list[Launch]:
    """Forward, backward, and step. cut: into segments; all: what else is optional, or nothing of it."""
    T = 128
    q, v = torch.zeros(1, T, 2, K, dtype=dtype), torch.zeros(1, T, 2, V, dtype=dtype)
    rates, states, bounds, learned = torch.zeros(2), None, None, kind in ("all", "learned")
    if kind == "all":
        rates, states = torch.zeros(1, T, 2), torch.zeros(2, 2, K, V)
        bounds = torch.tensor([0, 1, T], dtype=torch.int32)

    def call() -> None:
        retention.forward(q, q, v, rates, 0.5, states, bounds)
        retention.backward(v, states, q, q, v, rates, 0.5, states, bounds, learned)
        retention.crossing(q, v, rates)
        retention.crossing_back(q, v, rates, 0.5)
        cache, rows = torch.zeros(1, 2, K, V), None
        if kind == "all":
            cache, rows = torch.zeros(3, 2, V, K, dtype=dtype).mT, torch.zeros(1, dtype=torch.int64)
        retention.step(q[:, 0], q[:, 0], v[:, 0], torch.zeros(2), cache, 0.5, rows)

    segment = retaining.segment
    retaining.segment = lambda T, *_: T // 2 if kind == "cut" and T > 1 else T + 1
    try:
        return launches(retaining, f"retention K={K} V={V} {str(dtype)[6:]}, {kind}", call)
    finally:
        retaining.segment = segment


SCANS = [(N, torch.bfloat16) for N in (1, 3, 9, 16, 32, 64, 100, 128, 256)]
SCANS += [(16, torch.float32), (16, torch.float16)]
HEADS = [(256, 512, torch.bfloat16, kind) for kind in ("bare", "cut", "learned", "all")]
HEADS += [(K, V, torch.bfloat16, "all") for K, V in ((128, 64), (60, 100), (320, 512))]
HEADS += [(128, 128, dtype, "all") for dtype in (torch.float16, torch.float32)]
HEADS += [(K, V, torch.bfloat16, "bare") for K, V in ((64, 64), (128, 128))]
FORMULAS = [(kind, gate) for kind in ("rms", "layer") for gate in ("bare", "after", "first")]
FORMULAS += [("rms", "Mamba-2")]


def all_launches(sm: int, names: list[str]) -> Iterator[Launch]:
    """On an NVIDIA GPU of compute capability sm / 10, or on AMD's (0); no two that compile to the same."""
    scan.device = retaining.device = lambda x: (1, sm)
    cases = [partial(scan_launches, *x, full, cut) for x in SCANS for full in (True, False) for cut in (1, 2)]
    cases += [partial(scan_launches, 16, torch.bfloat16, True, 1, True)]
    both = itertools.product((2, 3, 4, 6), (False, True))
    cases += [partial(conv_launches, W, torch.bfloat16, True, tokens) for W, tokens in both]
    cases += [partial(conv_launches, 4, dtype, False, True) for dtype in (torch.bfloat16, torch.float32)]
    cases += [partial(conv_launches, 4, *case) for case in ((torch.float32, True), (torch.bfloat16, False))]
    norms = [(D, torch.bfloat16) for D in (64, 256, 300, 1536, 4096, 5000)] + [(4096, torch.float32)]
    cases += [partial(norm_launches, *x, *formula) for x in norms for formula in FORMULAS]
    cases += [partial(retention_launches, *case) for case in HEADS]
    seen = set()
    for case in cases:
        for launch in case():
            key = source(launch, GPUTarget("cuda", sm or 90, 32)).hash() + str(launch.options)
            if all(re.search(name, launch.what) for name in names) and key not in seen:
                seen.add(key)
                yield launch


def row(sm: int, launch: Launch) -> str | None:
    """A line of the table; AMD's compiler tells only that it can."""
    if not sm:
        shared = compiled(launch, AMD).metadata.shared
        assert shared <= 64 << 10, f"{launch.what}: {launch.kernel.__name__} takes {shared} bytes on AMD's"
        return None
    r = resources(launch, sm)
    spent = "" if r.slots is None else f"{r.slots:.2f}"
    numbers = f"{sm:3} {r.registers:10} {r.stack:8} {r.shared:7}  {spent:>5}"
    return f"{launch.what:48} {launch.kernel.__name__:24} {numbers}"


def main(names: list[str]) -> None:
    print(f"{'':48} {'kernel':24}  sm  registers  spilled  shared  slots")
    tasks = [(sm, launch) for sm in (*NVIDIA, 0) for launch in all_launches(sm, names)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(row, *zip(*tasks)):
            if line:
                print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
