"""What a machine can do at best, how long a call takes on it, and how much memory: a CPU's, then a GPU's.

Others use a CPU meanwhile. A GPU's time is between CUDA events, each call from a cold cache.
"""

import ast
import ctypes
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from platform import machine
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
MB_256 = 64 * 2**20  # floats
SECONDS = 3.0  # that a race takes, warm-up apart
BURST, MOST_CALLS = 0.02, 200  # fast calls come in bursts of 20 ms
LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_MAX, M_MMAP_THRESHOLD = -1, -4, -3
DEVICE = "cuda"
GIB = 2**30
SIDE = 8192  # of the matrices whose product shows the rate of tensor cores
TURN, TURNS = 0.03, 3  # seconds of a turn


class CpuLimits(NamedTuple):
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


def cpu_limits(scratch: Path) -> CpuLimits:
    """Compiles limits.cpp into `scratch`; takes 5 s."""
    library = ctypes.CDLL(str(compiled(scratch / "limits.so")))
    for function in (library.fma_flops, library.exps):
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    a, b, c = (torch.ones(MB_256) for _ in range(3))
    triad = 3 * 4 * MB_256 / best(lambda: torch.add(b, c, alpha=3.0, out=a))
    m = torch.ones(1024, 1024)
    sgemm = 2 * 1024**3 / best(lambda: m @ m, 50)
    return CpuLimits(on_every_thread(library.fma_flops), on_every_thread(library.exps), triad, sgemm)


def compiled(library: Path) -> Path:
    """limits.cpp as setup.py would compile a kernel for the instruction set that torch uses here."""
    flags: dict[str, dict[str, str]] = {}
    for line in ast.parse((HERE.parent / "setup.py").read_text()).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) in ("AVX512", "ISAS"):
            exec(ast.unparse(line), flags)
    isa = flags["ISAS"].get(torch.backends.cpu.get_cpu_capability().lower(), "")
    options = f"-std=c++17 -O3 -fPIC -shared {isa} -I{HERE.parent / 'csrc/cpu'}".split()
    subprocess.run(["c++", *options, HERE / "limits.cpp", "-o", library], check=True)
    return library


def on_every_thread(function, n: int = 3_000_000) -> float:
    """Units a second while as many threads as torch has run `function`; ctypes lets go of the interpreter."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return threads * function(n) / best(lambda: list(pool.map(function, [n] * threads)))


def best(call: Callable, rounds: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    return min(timed(call)[0] for _ in range(rounds))


def processor() -> str:
    """Its model's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), machine())


def flops(call: Callable, **options: object) -> int:
    """Of matrix products."""
    with FlopCounterMode(display=False, **options) as counter:
        call()
    return counter.get_total_flops()


def allocate_as_after_a_while() -> None:
    """glibc raises its thresholds with what a program frees; this is where they end."""
    LIBC.mallopt(M_MMAP_MAX, 65536)
    LIBC.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    LIBC.mallopt(M_TRIM_THRESHOLD, 64 << 20)


@contextmanager
def freed_memory_kept():
    """No tensor's pages go back to the system, so that none is cleared again: 22 ms for each 100 MB."""
    LIBC.mallopt(M_MMAP_MAX, 0)
    LIBC.mallopt(M_TRIM_THRESHOLD, -1)
    yield
    allocate_as_after_a_while()


def interruptions() -> int:
    """How often another process has taken a core from one of our threads."""
    return getrusage(RUSAGE_SELF).ru_nivcsw


def timed(call: Callable) -> tuple[float, int]:
    """Seconds and interruptions."""
    before, start = interruptions(), perf_counter()
    call()
    return perf_counter() - start, interruptions() - before


def typical(samples: list[tuple[float, int]]) -> float:
    """The median, of the undisturbed where they are three or more."""
    quiet = [seconds for seconds, disturbed in samples if not disturbed]
    return median(quiet if len(quiet) >= 3 else [seconds for seconds, _ in samples])


class Attempt(NamedTuple):
    """The first call, and with it what a caller needs to know of a rival that takes minutes."""

    answer: object
    seconds: float
    mb: float


def attempt(call: Callable) -> Attempt:
    """One call from a trimmed heap; mb is the most that was resident during it, less what was before."""
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before, start = resident("VmRSS"), perf_counter()
    answer = call()
    seconds = perf_counter() - start
    return Attempt(answer, seconds, (resident("VmHWM") - before) / 1e6)


def memory(tries: list[Attempt]) -> dict[str, float | None]:
    """Columns of what ours took, and the rival where there is one."""
    mb, rival_mb = [*(tried.mb for tried in tries), None][:2]
    return dict(mb=mb, rival_mb=rival_mb)


def resident(which: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


class Race:
    """Calls of ours and of the rival in turns: what happens to the machine meanwhile happens to both.

    Either begins its turn with a call that does not count: it finds the other's data in the caches, and its
    own pages given back to the system.
    """

    def __init__(self, ours: Callable, rival: Callable | None, rival_before: float | None = None):
        """rival_before: seconds of a call made already, where another for warming up would take too long.

        Without a rival ours runs alone.
        """
        self.ours, self.rival, self.rival_before = ours, rival or ours, rival_before
        self.seconds, rival_seconds = timed(ours)[0], rival_before or timed(self.rival)[0]
        self.burst, self.rival_burst = calls(self.seconds), calls(rival_seconds) if rival else 0
        self.alone = rival is None
        if rival_before:
            self.burst = max(self.burst, 3)
        seconds = SECONDS / 3 if rival is None else SECONDS
        turn = (self.burst + 1) * self.seconds + (self.rival_burst + 1) * rival_seconds
        self.turns = 1 if rival_before else min(max(3, round(seconds / turn)), 50)
        self.rival_samples = [(rival_before, 1)] if rival_before else []
        self.disturbed: list[int] = []
        self.calls = 0

    def columns(self, benchmark, each: int = 1) -> dict[str, float | None]:
        """Median seconds of ours, which pytest-benchmark times, of the rival's, in between, and of ours where
        the allocator keeps what was freed; of one of `each` tokens that a call takes."""
        benchmark.pedantic(self.ours, setup=self.before_ours, rounds=self.turns * self.burst)
        self.disturbed.append(interruptions() - self.mark)
        seconds = typical(list(zip(benchmark.stats.stats.data, self.disturbed))) / each
        rival_seconds = None if self.alone else typical(self.rival_samples) / each
        with freed_memory_kept():
            self.ours()
            rounds = max(self.burst, min(5, round(SECONDS / self.seconds)), 1)
            kept = typical([timed(self.ours) for _ in range(rounds)]) / each
        return dict(seconds=seconds, seconds_memory_kept=kept, rival_seconds=rival_seconds)

    def before_ours(self) -> None:
        if self.calls:
            self.disturbed.append(interruptions() - self.mark)
        if self.calls % self.burst == 0:
            if not self.rival_before and not self.alone:
                self.rival()
            self.rival_samples += [timed(self.rival) for _ in range(self.rival_burst)]
            self.ours()
        self.calls += 1
        self.mark = interruptions()


def calls(seconds: float) -> int:
    """In a burst."""
    return min(max(1, round(BURST / seconds)), MOST_CALLS)


class GpuLimits(NamedTuple):
    """Per second.

    copy: bytes read and written by a copy of 1 GiB. special: special functions (exp2 is one), 16 a clock and
    multiprocessor; issue: instructions of a lane, 128 a clock and multiprocessor; at the highest clock.
    matmul: FLOPs of torch's product of two bfloat16 matrices of 8192 x 8192.
    """

    copy: float
    special: float
    issue: float
    clock: float
    multiprocessors: int
    matmul: float

    def floor(self, bytes: float, special: float = 0, flops: float = 0) -> float:
        """Seconds that a computation takes at least. flops: of products of matrices."""
        return max(bytes / self.copy, special / self.special, flops / self.matmul)


def gpu_limits() -> GpuLimits:
    import triton  # here alone: CPUs do without

    source, target = (torch.ones(GIB, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    copy = 2 * GIB / gpu_seconds(lambda: target.copy_(source))
    square = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=DEVICE)
    matmul = 2 * SIDE**3 / gpu_seconds(lambda: square @ square)
    chip = triton.runtime.driver.active.utils.get_device_properties(0)
    clock, chips = 1e3 * chip["sm_clock_rate"], chip["multiprocessor_count"]
    return GpuLimits(copy, 16 * clock * chips, 128 * clock * chips, clock, chips, matmul)


def gpu_seconds(call: Callable) -> float:
    """The median of calls, between CUDA events.

    Before each, 2 GiB are written twice, 1 ms: no data is in the L2 cache, and Python has launched the call
    before the GPU is free for it, unless it is plain torch, step by step. The 256 MB of triton.testing's
    do_bench end before that.
    """
    written = torch.empty(2 * GIB, dtype=torch.uint8, device=DEVICE)

    def samples(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            written.zero_()
            written.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    once = median(samples(5))
    return median(samples(min(max(5, round(TURN / once)), 100)))


def gpu_race(ours: Callable, rival: Callable | None) -> tuple[float, float | None]:
    """Seconds of ours and of the rival, measured in turns: what happens to the GPU happens to both."""
    turns = [(gpu_seconds(ours), rival and gpu_seconds(rival)) for _ in range(TURNS)]
    ours_seconds, rival_seconds = zip(*turns)
    return median(ours_seconds), rival and median(rival_seconds)


def graph(calls: list[Callable]) -> Callable:
    """All calls in one launch: what is left of the time when Python's is gone."""
    for call in calls[:3]:
        call()  # compiles
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for call in calls:
            call()

    def replay() -> list[Callable]:
        recorded.replay()
        return calls  # they hold the memory that the graph reads and writes

    return replay


def peak(call: Callable) -> int:
    """The most bytes that were allocated on the GPU during a call, less what was before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def size(tensors: Iterable[Tensor]) -> int:
    """In bytes."""
    return sum(u.numel() * u.element_size() for u in tensors)


def chip() -> dict[str, object]:
    """Of the GPU, for the results."""
    found = torch.cuda.get_device_properties(0)
    known = {"name": found.name, "memory": found.total_memory, "cuda": torch.version.cuda}
    return known | {"capability": f"{found.major}.{found.minor}"}
