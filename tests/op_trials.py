"""What ops are put through in a process of its own, `python op_trials.py NAME`: a fork, memory that ends.

Calls that are shared out over threads, forward and backward, too.
"""

import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lcikernels
from lcikernels.backends import TABLES, load

STEPS = ("retention_step", "selective_scan_step", "causal_conv1d_step")
OPS = ("retention", "selective_scan", "causal_conv1d", "gated_rms_norm", "kronecker_expand", *STEPS)
ON_CPU = [(op, backend) for op in OPS for backend in TABLES[op] if backend in ("cpp", "torch")]


def inputs(op: str, seed: int, T: int = 200) -> dict[str, object]:
    """Of more work than one thread does alone."""
    random = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=random).requires_grad_(op not in STEPS)

    def rates(*shape):
        return -torch.rand(*shape, generator=random).requires_grad_(op not in STEPS)

    return {
        "retention": lambda: dict(q=r(1, T, 4, 32), k=r(1, T, 2, 32), v=r(1, T, 4, 48), log_decay=rates(4)),
        "selective_scan": lambda: (
            dict(x=r(1, T, 96), dt=r(1, T, 96), a=rates(96, 16), b=r(1, T, 2, 16))
            | dict(c=r(1, T, 2, 16), d=r(96), z=r(1, T, 96), dt_softplus=True)
        ),
        "causal_conv1d": lambda: dict(x=r(2, T, 400), weight=r(400, 4), bias=r(400), activation="silu"),
        "gated_rms_norm": lambda: dict(x=r(2, T, 400), gate=r(2, T, 400), weight=r(400), bias=r(400)),
        "kronecker_expand": lambda: (
            dict(weight=r(3, T, 120), write=r(260, T), read=r(200, 120)) | dict(depth=r(4, 3))
        ),
        "retention_step": lambda: (
            dict(q=r(8, 8, 64), k=r(8, 4, 64), v=r(8, 8, 64), log_decay=rates(8))
            | dict(state=r(8, 8, 64, 64))
        ),
        "selective_scan_step": lambda: (
            dict(x=r(8, 900), dt=r(8, 900), a=rates(900, 16), b=r(8, 2, 16))
            | dict(c=r(8, 2, 16), dt_softplus=True, state=r(8, 900, 16))
        ),
        "causal_conv1d_step": lambda: dict(x=r(40, 900), weight=r(900, 4), state=r(40, 900, 3)),
    }[op]()


def results(op: str, backend: str, given: dict[str, object]) -> list[Tensor]:
    """The output and every gradient, or the state that a step leaves; inputs stay as they are."""
    state = {"state": given["state"].clone()} if "state" in given else {}
    out = getattr(lcikernels, op)(**given | state, backend=backend)
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return [out, *state.values()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(map(torch.equal, xs, ys))


def near(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all((x - y).abs().max() <= 1e-4 * y.abs().max() for x, y in zip(xs, ys))


def in_a_child(run: Callable[[], bool]) -> int:
    """What became of `run` in a child that is forked: 0 where it gave True."""
    child = os.fork()
    if not child:
        os._exit(0 if run() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork() -> None:
    """In a child, and in its child, every op gives what it gave before, after threads were at work."""
    given = {op: inputs(op, 0) for op in OPS}
    whole = {key: results(key[0], key[1], given[key[0]]) for key in ON_CPU}
    (torch.ones(2**20) + 1).sum()  # on torch's threads

    def right() -> bool:
        return all(near(results(*key, given[key[0]]), whole[key]) for key in ON_CPU)

    assert in_a_child(lambda: right() and in_a_child(right) == 0) == 0
    assert torch.get_num_threads() == 2
    assert right()


def address_space() -> int:
    return int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def starve() -> None:
    """However little memory is left, an op gives what it gave before, or an error; and so does the next one.

    The limit rises from nothing by 256 KB until an op has all that it needs.
    """
    most, refused = resource.getrlimit(resource.RLIMIT_AS)[1], 0
    (torch.ones(2**20) + 1).sum()
    for op, backend in ON_CPU:
        given, failed = inputs(op, 0), 0
        torch.set_num_threads(2)
        load(op, backend)
        small = results(op, backend, inputs(op, 1, 20))
        whole = None
        while whole is None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + (failed << 18), most))
            try:
                whole = results(op, backend, given)
            except (RuntimeError, MemoryError):
                failed += 1
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
            if failed % 8 == 0:
                assert same(results(op, backend, inputs(op, 1, 20)), small), f"{op} by {backend}"
        assert same(results(op, backend, given), whole), f"{op} by {backend}: {failed}"
        refused += failed > 0  # a step may find room in what was freed before it
    assert refused > len(ON_CPU) // 2, f"memory ended for {refused} of {len(ON_CPU)}"


if __name__ == "__main__":
    torch.set_num_threads(2)
    {"fork": fork, "starve": starve}[sys.argv[1]]()
