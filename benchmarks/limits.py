"""What this machine can do at best, measured in the run whose results are held against it."""

import ast
import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
MB_256 = 64 * 2**20  # floats


class Limits(NamedTuple):
    """In units per second, on all of torch's threads.

    triad: bytes of a = b + s c over 3 arrays of 256 MB; that a is read before it is written is not counted.
    sgemm: torch's product of two 1024 x 1024 matrices.
    """

    flops: float
    exps: float
    triad: float
    sgemm: float

    def floor(self, bytes: float, flops: float) -> float:
        """Seconds that a computation takes at least, unless its data is in a cache already."""
        return max(bytes / self.triad, flops / self.flops)


def measure(scratch: Path) -> Limits:
    """Compiles limits.cpp into `scratch`; takes 5 s."""
    library = ctypes.CDLL(str(compiled(scratch / "limits.so")))
    for function in (library.fma_flops, library.exps):
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    a, b, c = (torch.ones(MB_256) for _ in range(3))
    triad = 3 * 4 * MB_256 / best(lambda: torch.add(b, c, alpha=3.0, out=a))
    m = torch.ones(1024, 1024)
    sgemm = 2 * 1024**3 / best(lambda: m @ m, 50)
    return Limits(on_every_thread(library.fma_flops), on_every_thread(library.exps), triad, sgemm)


def compiled(library: Path) -> Path:
    """limits.cpp as setup.py would compile a kernel for the instruction set that torch uses here."""
    tree = ast.parse((HERE.parent / "setup.py").read_text())
    constants = {ast.unparse(x.targets[0]): x.value for x in tree.body if isinstance(x, ast.Assign)}
    isa = ast.literal_eval(constants["ISAS"]).get(torch.backends.cpu.get_cpu_capability().lower(), "")
    flags = f"-std=c++17 -O3 -fPIC -shared {isa} -I{HERE.parent / 'csrc/cpu'}".split()
    subprocess.run(["c++", *flags, HERE / "limits.cpp", "-o", library], check=True)
    return library


def on_every_thread(function, n: int = 3_000_000) -> float:
    """Units a second while as many threads as torch has run `function`; ctypes lets go of the interpreter."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        seconds = best(lambda: list(pool.map(function, [n] * threads)))
    return threads * function(n) / seconds


def best(call, rounds: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    seconds = []
    for _ in range(rounds):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return min(seconds)
