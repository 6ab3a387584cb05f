"""A bad day: many threads at once, forks, memory that ends; no result is wrong, no process dies or hangs."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import op_trials
import pytest
import torch
from devices import why_not
from op_trials import ON_CPU, inputs, results, same

from lcikernels import retention_step
from lcikernels.backends import choose

CALLERS = 8


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op, backend", ON_CPU, ids=map(" by ".join, ON_CPU))
def test_threads_that_call_at_once_get_the_bits_that_one_gets(op, backend, two_threads):
    """Each with numbers of its own, and two threads inside each call."""
    if why := why_not(op, backend):
        pytest.skip(why)
    given = [inputs(op, seed, 100) for seed in range(CALLERS)]
    alone = [results(op, backend, own) for own in given]
    barrier = Barrier(CALLERS)

    def call(seed):
        barrier.wait()
        assert torch.get_num_threads() == 2
        return same(results(op, backend, given[seed]), alone[seed])

    with ThreadPoolExecutor(CALLERS) as pool:
        assert all(pool.map(call, range(CALLERS)))


def test_one_state_of_many_is_advanced_by_each_thread(two_threads):
    """Rows of one cache, as a server's requests have them."""
    given = inputs("retention_step", 0)
    token = {name: x for name, x in given.items() if name != "state"}
    cache = given["state"].repeat(CALLERS, 1, 1, 1)
    alone = results("retention_step", choose("retention_step", None, given["q"]), given)

    def call(caller):
        rows = torch.arange(8 * caller, 8 * caller + 8)
        return retention_step(**token, state=cache, state_indices=rows)

    with ThreadPoolExecutor(CALLERS) as pool:
        outputs = list(pool.map(call, range(CALLERS)))
    assert all(torch.equal(y, alone[0]) for y in outputs)
    assert torch.equal(cache, alone[1].repeat(CALLERS, 1, 1, 1))


# Every allocation beyond a page or so is a mapping of its own, so that a limit meets it.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.parametrize("trial", ["fork", "starve"])
def test_a_process_survives(trial):
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(op_trials.__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, op_trials.__file__, trial],
        env=os.environ | MAPPED | paths,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
