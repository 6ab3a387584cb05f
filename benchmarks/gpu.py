"""What a GPU can do at best, how long a call takes on it, and how much memory."""

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = "cuda"
GIB = 2**30
SIDE = 8192  # of the matrices whose product shows the rate of tensor cores
TURN, TURNS = 0.03, 3  # seconds of a turn


class Limits(NamedTuple):
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


def least(sizes: dict[str, int], read: int, x: int, elements: int) -> tuple[tuple[float, float, float], ...]:
    """Forward's and backward's bytes, special functions, FLOPs. read, x: bytes of inputs and output."""
    N, K = sizes.get("N"), sizes.get("K", 0)
    forward = read + x, elements * (N + 4 if N else 0), elements * 4 * K
    return forward, (2 * read + x, elements * (2 * N + 6 if N else 0), elements * 10 * K)


def measure() -> Limits:
    import triton  # here alone: CPUs do without

    source, target = (torch.ones(GIB, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    copy = 2 * GIB / seconds(lambda: target.copy_(source))
    square = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=DEVICE)
    matmul = 2 * SIDE**3 / seconds(lambda: square @ square)
    chip = triton.runtime.driver.active.utils.get_device_properties(0)
    clock, chips = 1e3 * chip["sm_clock_rate"], chip["multiprocessor_count"]
    return Limits(copy, 16 * clock * chips, 128 * clock * chips, clock, chips, matmul)


def seconds(call: Callable) -> float:
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


def race(ours: Callable, rival: Callable | None) -> tuple[float, float | None]:
    """Seconds of ours and of the rival, measured in turns: what happens to the GPU happens to both."""
    turns = [(seconds(ours), rival and seconds(rival)) for _ in range(TURNS)]
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
    """The most bytes that were allocated during a call, less what was before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def size(tensors: list[Tensor]) -> int:
    """In bytes."""
    return sum(u.numel() * u.element_size() for u in tensors)


def description() -> dict[str, object]:
    """Of the GPU, for the results."""
    chip = torch.cuda.get_device_properties(0)
    return {
        "name": chip.name,
        "memory": chip.total_memory,
        "capability": f"{chip.major}.{chip.minor}",
        "cuda": torch.version.cuda,
    }
