"""`make sanitize`: csrc under the sanitizers for addresses, undefined behaviour and races."""

import sys

import pytest

from csrc import sanitizers


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A sanitized one, and the environment for its tests."""
    folder = tmp_path_factory.mktemp("addresses")
    if reason := sanitizers.why_not(sanitizers.MEMORY, folder) or sanitizers.cannot_run("base"):
        pytest.skip(reason)
    return folder, sanitizers.checkout(folder)


@pytest.fixture(scope="module")
def races(tmp_path_factory):
    folder = tmp_path_factory.mktemp("races")
    if reason := sanitizers.why_not(sanitizers.RACES, folder):
        pytest.skip(reason)
    return folder


@pytest.fixture(params=sanitizers.BUILDS)
def build(request):
    if reason := sanitizers.cannot_run(request.param):
        pytest.skip(reason)
    return request.param


def test_kernels_keep_to_their_memory_and_to_what_is_defined(checkout, build):
    program = sanitizers.program(checkout[0] / "build", build, f"-O1 {sanitizers.MEMORY}")
    sanitizers.assert_clean(program)
    sanitizers.assert_seen("short", program)


def test_kernels_on_threads_and_called_by_three_do_not_race(races, build):
    program = sanitizers.program(races, build, f"-O1 {sanitizers.RACES}")
    sanitizers.assert_clean(program)
    sanitizers.assert_seen("twice", program)


# Emulated GPUs and tiles are in tests/csrc; machine code, ARM and the sample of this are nothing to sanitize.
LEFT_OUT = "machine_code or on_arm or sanitizers or where_they_were_asked_for or outside_of_tensors"
OPS = "retention", "selective_scan", "causal_conv1d", "gated_rms_norm", "kronecker_expand"


@pytest.mark.parametrize("part", ["csrc", *(f"ops/test_{op}.py" for op in OPS)])
def test_the_library_in_python_is_clean(checkout, part):
    at, env = checkout
    if not (at / "tests" / part).exists():
        pytest.skip(f"no tests/{part}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{part}"]
    failed, said = sanitizers.run([*command, "-k", f"not ({LEFT_OUT})"], cwd=at, env=env)
    assert not failed, said[-6000:]
