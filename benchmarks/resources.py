"""What the Triton kernels take on each GPU, without one: registers, spills, shared memory, instructions.

    python -m benchmarks.resources           every configuration that the launchers choose, 5 minutes
    ... "N=16 bfloat16, all"                 those with this in their name

The launchers run with kernels that only note their arguments; then these are compiled as a launch would.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lcikernels.ops.causal_conv1d import kernel as conv
from lcikernels.ops.selective_scan import kernel as scan

NVIDIA = (80, 90, 100)
AMD = GPUTarget("hip", "gfx942", 64)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


class Launch(NamedTuple):
    """A kernel with the arguments and options of one launch; what: which case of its op."""

    what: str
    kernel: JITFunction
    arguments: dict
    options: dict


class Resources(NamedTuple):
    """Of one kernel on one GPU. loops: instructions of its loops, the innermost first."""

    what: str
    kernel: str
    sm: int
    registers: int
    stack: int
    shared: int
    loops: list[int]


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
    """Every launch of `call`, which uses the kernels in `module`."""
    kernels = {name: x for name, x in vars(module).items() if name.endswith("_kernel")}
    notes: list[Launch] = []
    for name, kernel in kernels.items():
        setattr(module, name, Noting(kernel, what, notes))
    try:
        call()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return notes


def compiled(launch: Launch, target: GPUTarget):
    """The kernel as this launch would compile it; tensors are taken to be aligned to 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments.values())):
        fixed = parameter.do_not_specialize or isinstance(value, Tensor)
        if parameter.is_constexpr or value is None or (not fixed and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[i,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or "i32"
            if not fixed and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    options = {k: v for k, v in launch.options.items() if k != "maxnreg" or target.backend == "cuda"}
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def resources(launch: Launch, sm: int) -> Resources:
    program = compiled(launch, GPUTarget("cuda", sm, 32))
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        code = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Resources(
        launch.what, launch.kernel.__name__, sm, registers, stack, program.metadata.shared, loops(code)
    )


def loops(code: str) -> list[int]:
    """Instructions of each loop: from a label to the branch back to it, NOPs apart."""
    labels, found, count = {}, [], 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)(.*);", line):
            count += instruction[1] != "NOP"
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1] == "BRA" and target and target[0] in labels:
                found.append(count - labels[target[0]])
    return sorted(x for x in found if x > 1)


FULL = [(16, torch.bfloat16), (16, torch.float32), *((N, torch.bfloat16) for N in (1, 3, 32, 64, 128, 256))]


def scan_launches(N: int, dtype: torch.dtype, full: bool, segments: int) -> list[Launch]:
    """Forward, backward and step; with all that is optional or with nothing."""
    T, D = 4, 64
    x, b = torch.zeros(1, T, D, dtype=dtype), torch.zeros(1, T, N, dtype=dtype)
    a, d, state = torch.zeros(D, N), torch.zeros(D), torch.zeros(2, D, N)
    z, bounds = x, torch.tensor([0, 1, T], dtype=torch.int32)
    if not full:
        d = z = state = bounds = None
    inputs = x, x, a, b, b, d, z, d, full, state, bounds
    token = (u if u is None or u.dim() < 3 else u[:, 0] for u in (x, x, a, b, b, d, z, d))
    checkpoints, final = torch.zeros(1, 1, D, N), torch.zeros(2 if full else 1, D, N)

    def call() -> None:
        scan.forward(*inputs, scan.CHUNK)
        scan.backward(x, final, *inputs, checkpoints, scan.CHUNK)
        scan.step(*token, full, final[:1])

    scan.cut, cut = lambda *_: T // segments, scan.cut
    case = f"N={N} {str(dtype)[6:]}, {'all' if full else 'bare'}" + (", in segments" if segments > 1 else "")
    notes = launches(scan, f"selective_scan {case}", call)
    scan.cut = cut
    return notes


def conv_launches(W: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Forward, backward and step; with all that is optional or with nothing."""
    T, D = 4, 64
    x, weight = torch.zeros(1, T, D, dtype=dtype), torch.zeros(D, W)
    bias, state, bounds = torch.zeros(D), torch.zeros(2, D, W - 1), torch.tensor([0, 1, T], dtype=torch.int32)
    filters = (weight, bias, "silu") if full else (weight, None, None)
    states = (state, bounds) if full else (None, None)

    def call() -> None:
        conv.forward(x, *filters, *states)
        conv.backward(x, state if full else None, x, *filters, *states)
        conv.step(x[:, 0], *filters, state[:1])

    case = f"W={W} {str(dtype)[6:]}, {'all' if full else 'bare'}"
    return launches(conv, f"causal_conv1d {case}", call)


def all_launches() -> Iterator[Launch]:
    for N, dtype in FULL:
        yield from scan_launches(N, dtype, True, 1)
    yield from scan_launches(16, torch.bfloat16, False, 1)
    yield from scan_launches(16, torch.bfloat16, True, 2)
    for W in (2, 3, 4, 6):
        yield from conv_launches(W, torch.bfloat16, True)
    yield from conv_launches(4, torch.float32, True)
    yield from conv_launches(4, torch.bfloat16, False)


def main(names: list[str]) -> None:
    print(f"{'':42} {'kernel':24}  sm  registers  spilled  shared  instructions of loops")
    for launch in all_launches():
        if not all(name in launch.what for name in names):
            continue
        for sm in NVIDIA:
            r = resources(launch, sm)
            numbers = f"{sm:3} {r.registers:10} {r.stack:8} {r.shared:7}  {r.loops}"
            print(f"{r.what:42} {r.kernel:24} {numbers}", flush=True)
        compiled(launch, AMD)


if __name__ == "__main__":
    main(sys.argv[1:])
