"""That the Triton kernels compile for GPUs which are not here, and keep in registers what they hold there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[1]
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program may have
SLOTS = {"forward_kernel": 9.3, "backward_kernel": 36.5}  # on an H100, a channel, state and token of Mamba
# Of what `python -m benchmarks.resources` compiles: every kernel with all that is optional at once, and at
# one size with nothing of it. The rest differs in masks, in which of it is missing, in warps that do the
# same, or takes fewer registers: float16 those of bfloat16, filters of 2 and 3 taps less than of 4.
CASES = [
    "selective_scan N=(1|32|256) bfloat16, all",  # the fewest; one token in registers, not two; the most
    "selective_scan N=16 bfloat16",
    "selective_scan N=16 float32, all",
    "causal_conv1d W=(4|6)",
    "gated_rms_norm D=((64|300) .*layer, first|(256|5000) .*layer, after|1536 .*rms, bare)",
    "gated_rms_norm D=((64|256|300) .*Mamba-2|4096 float32, layer, first)",
    "retention K=256 V=512 bfloat16, (all|bare)",
    "retention K=128 V=(64|128)",
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_every_gpu_and_spill_nothing(case):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resources", case]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    rows = [(line[:48], *line[48:].split()) for line in run.stdout.splitlines()[1:]]
    assert {int(sm) for _, _, sm, *_ in rows} == set(SHARED)
    for what, kernel, sm, _, spilled, shared, *slots in rows:
        assert int(spilled) == 0 and int(shared) <= SHARED[int(sm)], run.stdout
        dense = case == "selective_scan N=16 bfloat16" and "[B, D, T]" not in what
        if dense and sm == "90" and slots:
            assert float(slots[0]) <= SLOTS[kernel], run.stdout
