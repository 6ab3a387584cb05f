"""That the Triton kernels compile for GPUs which are not here, and keep in registers what they hold there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[1]
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program may have
SLOTS = {"forward_kernel": 9, "backward_kernel": 40}  # on an H100, for each channel, state and token of Mamba
SCANS = [
    "N=1 ",
    "N=3 ",
    "N=9 ",
    "N=16 bfloat16",
    "N=16 float",
    "N=32 ",
    "N=64 ",
    "N=100 ",
    "N=128 ",
    "N=256 ",
]


@pytest.mark.parametrize("case", [*SCANS, "causal_conv1d", "gated_rms_norm", "retention"])
def test_kernels_compile_for_every_gpu_and_spill_nothing(case):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resources", case]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    rows = [line[48:].split() for line in run.stdout.splitlines()[1:]]
    assert {int(sm) for _, sm, *_ in rows} == set(SHARED)
    for kernel, sm, _, spilled, shared, *slots in rows:
        assert int(spilled) == 0 and int(shared) <= SHARED[int(sm)], run.stdout
        if case == "N=16 bfloat16" and sm == "90" and slots:
            assert float(slots[0]) <= SLOTS[kernel], run.stdout
