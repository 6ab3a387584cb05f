"""That the Triton kernels compile for GPUs which are not here, and keep in registers what they hold there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[1]
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program may have


@pytest.mark.parametrize("case", ["N=16 bfloat16, all", "N=16 float32", "W=4 bfloat16, all", "W=6"])
def test_kernels_compile_for_every_gpu_and_spill_nothing(case):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resources", case]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    rows = [line.rpartition("_kernel")[2].split(maxsplit=4) for line in run.stdout.splitlines()[1:]]
    assert {int(sm) for sm, *_ in rows} == set(SHARED)
    for sm, _, spilled, shared, _ in rows:
        assert int(spilled) == 0 and int(shared) <= SHARED[int(sm)], run.stdout
