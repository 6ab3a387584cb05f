"""Kernels as the compiler leaves them: compiled for GPUs that are not here, by Triton as a launch would."""

import re
import subprocess
from functools import cached_property
from math import prod, sqrt
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from . import code
from .code import Counts, Instruction, Loop
from .launches import Launch, flat
from .trips import Pointer, Trips, Walked, walked

AMD = GPUTarget("hip", "gfx942", 64)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PTX = r"\b(ld\.global|cp\.async\.c[ag]|st\.global|wgmma\.mma_async|mma\.sync|shfl|red\.|atom\.)"
PTX += r"|\b(ex2\.|lg2\.|rcp\.|div\.full)"
ALIKE = 0.3  # of two loops' lines, as the cosine of their counts


class Program:
    """A kernel's machine code on a GPU of compute capability sm / 10."""

    def __init__(self, launch: Launch, sm: int):
        self.launch = launch
        made = compiled(launch, GPUTarget("cuda", sm, 32))
        self.shared, self.warps, self.asm = made.metadata.shared, made.metadata.num_warps, made.asm
        usage = self.said("cuobjdump", "--dump-resource-usage")
        self.registers, self.stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())

    def said(self, tool: str, *options: str) -> str:
        """Of the machine code, by a tool."""
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            return said(tool, *options, file.name)

    @cached_property
    def parsed(self) -> tuple[list[Instruction], list[tuple[int, int]]]:
        return code.parse(code.function(self.said("nvdisasm", "-g", "-c")))

    @cached_property
    def loops(self) -> list[Loop]:
        return code.loops(*self.parsed)[1]

    @cached_property
    def hazards(self) -> list[str]:
        return code.in_flight(*self.parsed)

    @cached_property
    def walk(self) -> Walked:
        named = flat(self.launch.arguments)
        values = {k: Pointer(k) if isinstance(x, Tensor) else x for k, x in named.items()}
        return walked(self.asm["ttir"], values, self.launch.grid)

    @cached_property
    def trips(self) -> list[float]:
        """How often a program goes through each of `loops`; an unrolled one less often."""
        unrolled = [
            max(1, round(code.anchors(loop.own) / max(1, there))) if there is not None else 1
            for loop, there in zip(self.loops, pairs(self.loops, ptx_loops(self.asm["ptx"])))
        ]
        return [(n or 0) / u for n, u in zip(pairs(self.loops, self.walk.loops), unrolled)]

    @cached_property
    def counts(self) -> Counts:
        """Of a warp, from the first instruction to the last."""
        total = code.counts(code.loops(*self.parsed)[0])
        for loop, n in zip(self.loops, self.trips):
            total += code.counts(loop.own).times(n)
        return total

    @property
    def longest(self) -> Counts:
        """Of one iteration of the longest loop, without those inside it."""
        return code.counts(max((loop.own for loop in self.loops), key=len, default=[]))

    @property
    def bytes(self) -> float:
        """Between memory and the chip: of each argument what is asked for, and never more than all of it.

        One tensor under two names counts once to be read and once to be written.
        """
        named, programs, total = flat(self.launch.arguments), prod(self.launch.grid), 0.0
        for asked in (self.walk.read, self.walk.written):
            seen = set()
            for name, bytes in asked.items():
                u = named[name]
                key = u.untyped_storage()._cdata, u.storage_offset()
                total += 0 if key in seen else min(u.numel() * u.element_size(), bytes * programs)
                seen.add(key)
        return total


def pairs(loops: list[Loop], others: list[Trips]) -> list[float | None]:
    """For each loop of the machine code `times` of the one whose source lines are most alike.

    Of an unrolled loop and its rest the larger ones belong together, so those choose first.
    """
    found: list[float | None] = [None] * len(loops)
    for other in sorted(others, key=lambda x: -x.lines.total()):
        free = [i for i, x in enumerate(found) if x is None]
        best = max(free, key=lambda i: (round(alike(loops[i], other), 1), len(loops[i].own)), default=None)
        if best is not None and alike(loops[best], other) > ALIKE:
            found[best] = other.times
    return found


def alike(a: Loop, b: Trips) -> float:
    dot = sum(n * b.lines[line] for line, n in a.lines.items())
    return dot / max(1e-9, sqrt(sum(n * n for n in a.lines.values()) * sum(n * n for n in b.lines.values())))


def ptx_loops(text: str) -> list[Trips]:
    """times: its memory accesses, products, shuffles, special functions, of which no compiler makes more."""
    files = dict(re.findall(r'\.file\s+(\d+) "[^"]*?([^/"]+)"', text))
    instructions, labels, ends, line = [], {}, {}, None
    for row in text.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", row):
            line = files[place[1]], int(place[2])
        elif label := re.match(r"(\$L__BB\d+_\d+):", row):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s*(@|[a-z{])", row):
            instructions.append(Instruction("anchor" if re.search(PTX, row) else "", [], line))
            target = re.search(r"\bbra(?:\.uni)? \s*(\$L__BB\d+_\d+)", row)
            if target and target[1] in labels:
                ends[labels[target[1]]] = len(instructions)
    _, loops = code.loops(instructions, code.nested(ends))
    return [Trips(loop.lines, sum(x.name == "anchor" for x in loop.own)) for loop in loops]


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


def said(tool: str, *arguments: str) -> str:
    """By one of NVIDIA's tools that come with Triton."""
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
