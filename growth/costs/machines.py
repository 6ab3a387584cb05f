"""What machines do a second: this one, measured in a moment, and GPUs, by their data sheets."""

import math
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil
import torch

from growth import apply
from growth.maps import Copies

WRITTEN, MADE, SQUARE = 2**23, 2**18, 1024  # bytes, numbers, of a product
UTILISATION = 0.4  # of a GPU's peak that training reaches: an assumption; 0.35 to 0.5 are common
DIRTY = 0.1  # of free memory: from there on Linux writes to the disk, by its defaults
TOGETHER = 8  # GPUs of a machine


@dataclass(frozen=True)
class Machine:
    """In units a second. read, hashed, cached, written: bytes; copied: numbers that stay, expanded: that are
    widened, drawn: at random, to part copies; products: operations of float32 matrix products, on all
    threads. room: bytes that memory takes before the disk is waited for."""

    read: float
    hashed: float
    cached: float
    written: float
    room: float
    copied: float
    expanded: float
    drawn: float
    products: float


@dataclass(frozen=True)
class Gpu:
    """memory in bytes; flops, single: products of bfloat16 (dense) and of float32 a second; link, network:
    bytes a second that each GPU receives, of those in its machine and of others."""

    name: str
    memory: float
    flops: float
    single: float
    link: float
    network: float

    def receives(self, gpus: int) -> float:
        return self.link if gpus <= TOGETHER else self.network


# NVIDIA's data sheets: SXM, NVLink 4 at 900 GB/s both ways; one port of 400 Gb/s a GPU.
H100 = Gpu("H100", 80e9, 989.4e12, 67e12, 450e9, 50e9)
H200 = Gpu("H200", 141e9, 989.4e12, 67e12, 450e9, 50e9)


def here(folder: Path) -> Machine:
    """This machine, as fast as it is when nothing else runs, and the disk of `folder`, or of what is nearest
    above it, in a fifth of a second.

    What is read was written just before: it comes from memory, as a source that was copied there does. Where
    the folder cannot be written, the system's one for such files is measured.
    """
    there = next(x for x in (folder, *folder.absolute().parents) if os.path.isdir(x))
    try:
        disk = _disk(there)
    except OSError:
        disk = _disk(None)
    room = psutil.virtual_memory().available * DIRTY
    return Machine(**disk, room=room, **_numbers())


def _disk(folder: Path | None) -> dict[str, float]:
    """Bytes a second that are read, hashed, taken by memory, and written there."""
    data = torch.randint(256, (WRITTEN,), dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".growth-") as file:

        def write() -> None:
            file.seek(0)
            file.write(data.numpy())
            file.flush()

        def keep() -> None:
            write()
            os.fsync(file.fileno())

        def read() -> torch.Tensor:
            return torch.from_file(file.name, size=WRITTEN, dtype=torch.uint8)

        write()
        return {
            "read": WRITTEN / best(lambda: read().clone()),
            "hashed": WRITTEN / best(lambda: zlib.crc32(read().numpy())),
            "cached": WRITTEN / best(write),
            "written": WRITTEN / best(keep),
        }


def _numbers() -> dict[str, float]:
    """Numbers a second that stay, that are widened, and that part copies, as a block of a tensor is made; and
    operations of products."""
    N = math.isqrt(MADE)
    of = Copies(2 * (*range(N // 2),), (0.5,) * N, N // 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(N // 2, N // 2, dtype=torch.bfloat16)
    wide = apply.read(of, apply.write(of, x))
    kept, square = wide.bfloat16(), torch.ones(SQUARE, SQUARE)
    return {
        "copied": MADE / best(lambda: kept.clone().aminmax()),
        "expanded": MADE / best(lambda: apply.read(of, apply.write(of, x)).bfloat16().aminmax()),
        "drawn": MADE / best(lambda: apply.add_noise(of, wide, 1.0, generator)),
        "products": 2 * SQUARE**3 / best(lambda: torch.mm(square, square)),
    }


def best(call: Callable[[], object], rounds: int = 3, least: float = 0.02) -> float:
    """Seconds of the fastest call, of so many rounds and `least` seconds: others may hold the cores."""
    seconds: list[float] = []
    while len(seconds) < rounds or sum(seconds) < least:
        began = perf_counter()
        call()
        seconds.append(max(perf_counter() - began, 1e-9))
    return min(seconds)
