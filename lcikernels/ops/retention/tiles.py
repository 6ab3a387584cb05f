"""Configurations of retention's kernels: what each may be for a GPU, and which is taken.

Those listed compile for that GPU without a spill, at every size that they are for (`benchmarks.resources`).
The first is the one that counting says is fastest; a table of measured ones in tuned/<GPU>.json wins over it.
"""

from functools import cache
from typing import NamedTuple

import torch

from ..launch import cdiv, power_of_2
from ..tuned import fastest

MOST = 512  # rows or columns of a state
SMALL = 128  # of heads whose state is one tile
CUT = 256  # tokens: segments are multiples of it
SHORT = 16  # tokens: not more go one by one, instead of a chunk's products of 64
BLOCK = 1024  # elements of a state that chain_kernel carries


class Tile(NamedTuple):
    """Rows and columns of a tile of S^T, how many tiles of rows a program has, its warps, stages of loads."""

    BX: int
    BZ: int
    TILES: int
    warps: int
    stages: int


def chunk(dtype: torch.dtype, sm: int) -> int:
    """Its tokens. A Hopper multiplies 64 at least; with them a GPU before would spill, with 32 float32."""
    if dtype == torch.float32:
        return 16
    return 64 if dtype == torch.bfloat16 and sm >= 90 else 32


def candidates(kernel: str, X: int, Z: int, dtype: torch.dtype, sm: int, ahead: bool = False) -> list[Tile]:
    """What `kernel` may be for states of X rows and Z columns: "walk" or "walk back" in time, either
    "with dots", "fused", "crossing", "gradients". ahead: its inputs have descriptors.
    """
    BX, BZ = (max(16, min(SMALL, power_of_2(size))) for size in (X, Z))
    warps = 8 if BZ == 128 else 4
    if kernel == "gradients":
        return [Tile(BX, BZ, 1, warps, 1) for warps in (8, 4)]
    if kernel == "fused":
        columns = [BZ, BZ // 2] if BZ > 64 else [BZ]  # two programs make the scores twice
        return [Tile(BX, b, 1, 8 if b == 128 else 4, 1) for b in columns]
    # 64 columns for 4 warps, a warp group: S^T is multiplied from the registers it is summed in. A thread has
    # 128 elements of it, 64 in float32: more would spill.
    rows = 32 * warps if dtype != torch.float32 else 16 * warps
    if "dots" in kernel and X > rows and not ahead and sm >= 90:
        rows = rows // 4 * 3  # rows after others load what those gave: 4 tiles would spill 8 to 16 bytes
    if kernel == "crossing":
        return [Tile(min(64, BX), BZ, 1, warps, 1)]
    # Wide tiles have fewer loads to wait for, 3 a chunk with 256 rows, 5 with 128, 9 with 64; backward in
    # time 256 spill 24 bytes. A tile that S does not fill is multiplied all the same.
    widest = (128 if "back" in kernel else 256) if ahead and BZ == 128 else 64
    widths = [w for w in (256, 128) if w <= widest and X % w == 0] + [min(64, BX)]
    stages = (2, 1) if ahead else (1,)
    return [Tile(w, BZ, cdiv(min(X, rows), w), warps, n) for w in widths for n in stages]


def key(kernel: str, X: int, Z: int, dtype: torch.dtype, ahead: bool) -> str:
    """Sizes as kernels are compiled for them."""
    return f"{kernel} X={X} Z={Z} {str(dtype)[6:]}{' ahead' * ahead}"


@cache
def chosen(
    kernel: str, X: int, Z: int, dtype: torch.dtype, sm: int, ahead: bool = False, gpu: str = ""
) -> Tile:
    """See `fastest`."""
    listed = candidates(kernel, X, Z, dtype, sm, ahead)
    return fastest("retention", gpu, key(kernel, X, Z, dtype, ahead), listed)
