"""A sample of `make sanitize`: two ops, each of another build, for addresses and undefined behaviour."""

import pytest

from csrc import sanitizers

BEST = next(x for x in ("avx512", "avx2", "base") if not sanitizers.cannot_run(x) or x == "base")
FLAGS = f"-O0 {sanitizers.MEMORY}"
SAMPLE = {
    "base": ("retention.forward retention.backward", "retention"),
    BEST: ("selective_scan.forward selective_scan.backward", "scan"),
}


@pytest.mark.parametrize("build", SAMPLE)
def test_kernels_keep_to_their_memory_and_to_what_is_defined(tmp_path, build):
    if reason := sanitizers.why_not(sanitizers.MEMORY, tmp_path) or sanitizers.cannot_run(build):
        pytest.skip(reason)
    only, op = SAMPLE[build]
    program = sanitizers.program(tmp_path, build, FLAGS, only)
    sanitizers.assert_clean(program, op)
    sanitizers.assert_seen("short", program, op)
