"""How long a call takes, and how much memory, on a machine that others use too."""

import ctypes
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from platform import machine
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter
from typing import NamedTuple

SECONDS = 3.0  # that a race takes, warm-up apart
BURST, MOST_CALLS = 0.02, 200  # fast calls come in bursts of 20 ms
LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_MAX, M_MMAP_THRESHOLD = -1, -4, -3


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


def processor() -> str:
    """Its model's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), machine())


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

    def run(self, benchmark) -> tuple[float, float | None]:
        """Median seconds of ours, which pytest-benchmark times, and of the rival's, in between."""
        benchmark.pedantic(self.ours, setup=self.before_ours, rounds=self.turns * self.burst)
        self.disturbed.append(interruptions() - self.mark)
        samples = list(zip(benchmark.stats.stats.data, self.disturbed))
        return typical(samples), None if self.alone else typical(self.rival_samples)

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

    def with_memory_kept(self) -> float:
        """Median seconds of ours where the allocator keeps what was freed."""
        with freed_memory_kept():
            self.ours()
            rounds = max(self.burst, min(5, round(SECONDS / self.seconds)), 1)
            return typical([timed(self.ours) for _ in range(rounds)])


def calls(seconds: float) -> int:
    """In a burst."""
    return min(max(1, round(BURST / seconds)), MOST_CALLS)
