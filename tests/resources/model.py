"""Predicted times: the least that a launch's own machine code takes on a GPU, and how much of it fits there.

    seconds = max(bytes / copy,
                  rounds * warps * flops / (matmul / processors),
                  rounds * warps * 32 special / (16 clock),
                  ceil(rounds * warps / 4) * slots / clock)         rounds = ceil(programs / processors)

A launch's programs are dealt out evenly; flops, special and slots (FLOPs of tensor cores, special functions
of a lane, instructions) are a warp's: counted in each loop of its machine code, times how often the launch's
integers make it go through it. bytes are what its arguments hold, each once, or what it
asks for where that is less. What waits cost is not in it, nor what a cache has no room for, nor the time from
one launch to the next: it says what is left to gain elsewhere, and which tiles are better. Times of one call
are summed; torch's own kernels count by their bytes.
"""

from math import ceil, prod
from typing import NamedTuple

from benchmarks.measure import GpuLimits

from .code import Counts

# An H200: what others measured there for a copy of large tensors and for products of large bfloat16 matrices;
# its 16 special functions and 4 warps (128 lanes) a clock and multiprocessor are NVIDIA's guide's.
H200 = GpuLimits(4.3e12, 16 * 132 * 1.98e9, 128 * 132 * 1.98e9, 1.98e9, 132, 790e12)

# In that guide's table of compute capabilities 8.0, 9.0 and 10.0: registers, warps, programs of a
# multiprocessor; its shared memory, of which each program takes 1 KB more, and a program's most.
REGISTERS, WARPS, PROGRAMS = 64 << 10, 64, 32
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
MOST = {sm: bytes - 1024 for sm, bytes in SHARED.items()}


class Launched(NamedTuple):
    """What the model takes of a launch: of a warp, of a program, of the grid."""

    counts: Counts
    warps: int
    programs: int
    bytes: float


def occupancy(sm: int, registers: int, warps: int, shared: int) -> int:
    """Programs that a multiprocessor has at once. A warp's registers come in lots of 256."""
    by_registers = REGISTERS // (warps * 32 * 8 * ceil(registers / 8))
    return min(PROGRAMS, WARPS // warps, by_registers, SHARED[sm] // (shared + 1024))


def bounds(x: Launched, limits: GpuLimits) -> dict[str, float]:
    """Seconds that each of the four takes."""
    rounds = ceil(x.programs / limits.multiprocessors)
    warps, all = rounds * x.warps, limits.multiprocessors
    return {
        "bytes": x.bytes / limits.copy,
        "products": warps * x.counts.flops * all / limits.matmul,
        "special": warps * 32 * x.counts.special * all / limits.special,
        "slots": ceil(warps / 4) * x.counts.slots / limits.clock,
    }


def predicted(launches: list[Launched], torch: list[float], limits: GpuLimits) -> tuple[float, str]:
    """Seconds of one call, and what bounds the launch that takes longest."""
    each = [max((s, name) for name, s in bounds(x, limits).items()) for x in launches]
    each += [(bytes / limits.copy, "bytes") for bytes in torch]
    return sum(s for s, _ in each), max(each)[1]


def launched(program) -> Launched:
    """Of a programs.Program."""
    return Launched(program.counts, program.warps, prod(program.launch.grid), program.bytes)
