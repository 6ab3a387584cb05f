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
# Of what `python -m benchmarks.resources` compiles: every kernel and tile, each dtype, with and without all
# that is optional. The rest differs in masks, and in which of it is missing.
CASES = [f"N={N} " for N in (1, 3, 32, 64, 128, 256)] + ["N=16 bfloat16", "N=16 float"]
CASES += ["causal_conv1d", "gated_rms_norm", "K=256 V=512 bfloat16, all", "K=256 V=512 bfloat16, bare"]
CASES += ["K=128 V=64", "V=128 float16", "V=128 float32"]


@pytest.mark.parametrize("case", CASES)
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
