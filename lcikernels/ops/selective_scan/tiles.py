"""Configurations of the scan's kernels: what each may be for a GPU, and which is taken; how the line is cut.

Those listed compile for that GPU without a spill, for every N that they are for (`benchmarks.resources`). The
first is the one that counting says is fastest; a table of measured ones in tuned/<GPU>.json wins over it.
"""

from functools import cache
from typing import NamedTuple

from ..launch import cdiv, power_of_2
from ..tuned import fastest

CHUNK = 64  # 1 byte of checkpoints for each channel and token at N = 16
SHORT, LONG = 256, 4096  # tokens: less are not cut, and no more sequences put together


class Tiles(NamedTuple):
    """BN, BD, warps; of STEPS tokens, 1 or 2, the backward keeps the states in registers.

    AHEAD: tokens from the loads of x, dt and z to their use, some 1000 cycles, as long as memory takes.
    """

    BN: int
    BD: int
    warps: int
    STEPS: int
    AHEAD: int


def candidates(N: int, sm: int, back: bool, exact: bool = False) -> list[Tiles]:
    """For N states on compute capability sm / 10, forward or back, in up to 8 warps. exact: x is float32."""
    BN, states = power_of_2(N), 8 if back and N > 16 else 16  # of a thread: what 255 registers hold
    BD = min(32, 8 * 32 * states // BN)
    tile = BN, BD, max(1, BN * BD // (32 * states))
    # Two tokens halve the states that go through the cache. Before Hopper they spill, on sm_100 of float32.
    two = N <= 16 and sm >= 90 and not (back and exact and sm >= 100)
    ahead = [(2, 8), (1, 4)] if two else [(1, 4)]
    return [Tiles(*tile, *tokens) for tokens in ahead]


def key(N: int, back: bool, exact: bool = False) -> str:
    return f"N={N}{' back' * back}{' float32' * exact}"


@cache
def chosen(N: int, sm: int, back: bool, exact: bool = False, gpu: str = "") -> Tiles:
    """See `fastest`."""
    return fastest("selective_scan", gpu, key(N, back, exact), candidates(N, sm, back, exact))


def cut(B: int, T: int, warps: int, processors: int) -> int:
    """Tokens of a segment that takes so many warps, on a GPU of so many multiprocessors.

    Where sequences are short or give every multiprocessor 3 warps: whole ones, up to LONG tokens together, as
    long as 4 warps are left. Else parts of SHORT tokens or more that give it 4 warps.
    """
    if T <= SHORT or B * warps >= 3 * processors:
        return T * max(1, min(B * warps // (4 * processors), LONG // T))
    parts = max(1, min(cdiv(4 * processors, warps), B * T // SHORT))
    return up(cdiv(B * T, parts), CHUNK)


def up(n: int, unit: int) -> int:
    """The next multiple."""
    return cdiv(n, unit) * unit
