"""`make sanitize`: csrc under the sanitizers for addresses, undefined behaviour and races."""

import sys

import pytest

from csrc import sanitizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a sanitizer's objects and programs."""
    made = {}

    def of(sanitizer):
        if sanitizer not in made:
            made[sanitizer] = tmp_path_factory.mktemp("sanitized")
        if reason := sanitizers.why_not(sanitizer, made[sanitizer]):
            pytest.skip(reason)
        return made[sanitizer]

    return of


def kernels(folder, build, sanitizer):
    if reason := sanitizers.cannot_run(build):
        pytest.skip(reason)
    return sanitizers.program(folder(sanitizer), build, f"-O1 {sanitizer}")


@pytest.mark.parametrize("build", sanitizers.BUILDS)
def test_kernels_keep_to_their_memory_and_to_what_is_defined(folder, build):
    program = kernels(folder, build, sanitizers.MEMORY)
    sanitizers.assert_clean(program)
    sanitizers.assert_seen("short", program)


@pytest.mark.parametrize("build", sanitizers.BUILDS)
def test_kernels_on_threads_and_called_by_three_do_not_race(folder, build):
    program = kernels(folder, build, sanitizers.RACES)
    sanitizers.assert_clean(program)
    sanitizers.assert_seen("twice", program)


@pytest.fixture(scope="module")
def checkout(folder):
    at = folder(sanitizers.MEMORY) / "checkout"
    at.mkdir()
    return at, sanitizers.checkout(at)


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
