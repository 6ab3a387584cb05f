"""What the Triton kernels take on GPUs that are not here: that they compile, keep in registers what they hold
there, never touch what a product still uses, and do no more than is recorded; and what proves that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[1]
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 0: 64 << 10}  # bytes that a program may have
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
# On an H100, bare, bfloat16, an iteration of the loop in which a warp of the kernel is longest: instructions,
# waits, barriers; programs of a multiprocessor. Of several compiled programs the most, and the fewest.
BUSIEST = {
    "selective_scan N=16 bfloat16, bare": {
        "forward_kernel": (1050, 0, 0, 8),
        "backward_kernel": (930, 0, 16, 8),
    },
    "retention K=256 V=512 bfloat16, bare": {
        "scores_kernel": (97, 2, 2, 3),
        "walk_kernel": (771, 9, 36, 1),
    },
}
# Launches of a call, Triton's and torch's, and a scan's slots of a lane for each channel, state and token.
CALLS = {
    ("selective_scan", "forward"): (3, 2, 9),
    ("selective_scan", "backward"): (14, 5, 40),
}


def run(*arguments: str) -> list[dict]:
    """In another process: here kernels are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resources", "--rows", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_every_gpu_spill_nothing_and_wait_for_their_products(case):
    rows = run(case)
    assert {row["sm"] for row in rows} == set(SHARED)
    for row in rows:
        assert row["shared"] <= SHARED[row["sm"]] and not row.get("spilled") and not row.get("hazards"), row
        assert row.get("programs", 1) >= 1, row
        if row["sm"] == 90 and (recorded := BUSIEST.get(row["what"], {}).get(row["kernel"])):
            slots, waits, barriers, programs = recorded
            assert row["slots"] <= slots and row["waits"] <= waits and row["barriers"] <= barriers, row
            assert row["programs"] >= programs, row
