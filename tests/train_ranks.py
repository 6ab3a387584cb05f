"""Processes that train together, for test_distributed.py, as torchrun starts them but forked, with torch.

`started` runs `growth train` in each under the environment that torchrun gives, and tells how each ended.
"""

import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import growth
from growth import __main__ as cli
from growth.cli import app as verbs
from growth.cli.printing import say
from growth.training import progress, trainer  # noqa: F401  what a run imports, before the fork

SECONDS = 120  # then a process that hangs is killed, and its test fails
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_ranks"])


class Ended(NamedTuple):
    """Exit codes, standard outputs and errors, by process."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Held(TrainerCallback):
    """Leaves the bytes of a process's own weights, gradients and moments, of each a line, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_optimizer_step(self, args, state, control, model, optimizer, **given):
        states = optimizer.state.values()
        moments = [x for state in states for name, x in state.items() if name.startswith("exp_avg")]
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        found = [sum(map(_own, of)) for of in (model.parameters(), gradients, moments)]
        (self.folder / f"held{args.process_index}").write_text("\n".join(map(str, found)))


class Received(TrainerCallback):
    """Leaves the bytes of weights and of gradients' sums that a process gets of others in its last step."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_step_begin(self, args, state, control, **given):
        self.counted = Collectives(args.world_size)
        self.counted.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **given):
        self.counted.__exit__(None, None, None)
        (self.folder / f"received{args.process_index}").write_text(str(self.counted.bytes))


class Collectives(TorchDispatchMode):
    """Counts what all_gather and reduce_scatter hand over."""

    WHOLE = {torch.ops.c10d._allgather_base_: 0, torch.ops.c10d._reduce_scatter_base_: 1}

    def __init__(self, processes: int):
        super().__init__()
        self.processes, self.bytes = processes, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if (whole := self.WHOLE.get(function._overloadpacket)) is not None:
            self.bytes += arguments[whole].nbytes * (self.processes - 1) // self.processes
        return function(*arguments, **named or {})


def _own(x: torch.Tensor) -> int:
    return (x.to_local() if isinstance(x, DTensor) else x).nbytes


def started(number: int, folder: Path, *runs: dict) -> Ended:
    """Processes that run growth.train(**settings) for each of `runs`, one after the other.

    A run may have `killed`, [process, step]: after that step a power cut takes that process; and `of`, a list
    of settings that one process has instead.
    """
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:  # the server has no other way to learn where modules are
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [SERVER.Process(target=_rank, args=(i, number, port, folder, runs)) for i in range(number)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(SECONDS)
        rank.kill()
        rank.join()
    out, err = ([(folder / f"{name}{i}").read_text() for i in range(number)] for name in ("out", "err"))
    # DDP warns, once in each process, when nothing is frozen any more.
    err = ["".join(x for x in text.splitlines(True) if "reducer.cpp" not in x) for text in err]
    return Ended([rank.exitcode for rank in ranks], out, err)


def _rank(rank: int, number: int, port: int, folder: Path, runs: tuple[dict, ...]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    if number > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    verbs.app = lambda *_, **__: [_train(rank, **run) for run in runs] and 0
    cli.main()


def _train(
    rank: int, killed: tuple[int, int] = (-1, -1), of: dict[int, dict] | None = None, **settings
) -> None:
    shown = progress.RunProgress.step

    def step(self, now):
        if killed == (rank, now):
            os.kill(os.getpid(), signal.SIGKILL)
        shown(self, now)

    progress.RunProgress.step = step
    say(str(growth.train(**settings | (of or {}).get(rank, {}))))
    sys.stdout.flush()
