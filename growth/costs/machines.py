"""What machines do a second: this one, measured in a moment, and GPUs, by their data sheets."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

WRITTEN, MADE = 2**23, 2**18  # bytes, numbers
UTILISATION = 0.4  # of a GPU's peak that training reaches: an assumption; 0.35 to 0.5 are common
TOGETHER = 8  # GPUs of a machine


@dataclass(frozen=True)
class Machine:
    """In units a second. read, written: bytes; copied: numbers that stay, expanded: that are widened, with
    noise for a quarter of them."""

    read: float
    written: float
    copied: float
    expanded: float


@dataclass(frozen=True)
class Gpu:
    """memory in bytes; flops: of dense bfloat16 products a second; link, network: bytes a second that each
    GPU receives, of those in its machine and of others."""

    name: str
    memory: float
    flops: float
    link: float
    network: float

    def receives(self, gpus: int) -> float:
        return self.link if gpus <= TOGETHER else self.network


# NVIDIA's data sheets: SXM, NVLink 4 at 900 GB/s both ways; one port of 400 Gb/s a GPU.
H100 = Gpu("H100", 80e9, 989.4e12, 450e9, 50e9)
H200 = Gpu("H200", 141e9, 989.4e12, 450e9, 50e9)


def here(folder: Path) -> Machine:
    """This machine and the disk of `folder`, or of what is nearest above it, in a tenth of a second.

    What is read was written just before: it comes from memory, as a source that was copied there does. Where
    the folder cannot be written, the system's one for such files is measured.
    """
    there = next(x for x in (folder, *folder.absolute().parents) if os.path.isdir(x))
    try:
        read, written = _disk(there)
    except OSError:
        read, written = _disk(None)
    x = torch.ones(MADE, dtype=torch.bfloat16)
    return Machine(read, written, MADE / best(lambda: x.clone().aminmax()), MADE / best(lambda: _expand(x)))


def _disk(folder: Path | None) -> tuple[float, float]:
    """Bytes a second that are read and written there."""
    data = os.urandom(WRITTEN)
    with tempfile.TemporaryFile(dir=folder) as file:

        def write() -> None:
            file.seek(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

        def read() -> None:
            file.seek(0)
            file.read()

        written, got = best(write, 2), best(read, 2)
    return WRITTEN / got, WRITTEN / written


def _expand(x: torch.Tensor) -> None:
    """As much work as a block of an expanded tensor is."""
    wide = torch.cat([x[: MADE // 2].float(), x[MADE // 2 :].float()]).mul_(0.5)
    wide[: MADE // 4] += torch.randn(MADE // 4)
    wide.bfloat16().aminmax()


def best(call: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(rounds):
        began = perf_counter()
        call()
        seconds.append(perf_counter() - began)
    return max(min(seconds), 1e-9)
