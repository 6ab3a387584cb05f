"""The compiled library: what it takes, and why it does not load."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from lcikernels import backends, extension, selective_scan

compiled = pytest.mark.skipif(extension.WHY_NOT is not None, reason=str(extension.WHY_NOT))


@compiled
def test_cpp_is_preferred_on_a_cpu_and_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, a, b = torch.zeros(1, 3, 4), torch.zeros(4, 2), torch.zeros(1, 3, 2)
    assert backends.choose("selective_scan", None, x) == "cpp"
    x, b = x.half(), b.half()
    assert backends.choose("selective_scan", None, x) == "torch"
    with pytest.raises(RuntimeError) as refusal:
        selective_scan(x, x, a, b, b, backend="cpp")
    reason = "it takes float32, float64 and bfloat16, x is torch.float16"
    assert str(refusal.value) == f"selective_scan: backend 'cpp' cannot run here: {reason}"


@compiled
def test_an_instruction_set_that_was_not_built_is_refused():
    with pytest.raises(RuntimeError, match="use_instruction_set: name must be one of base.*, got sse9"):
        torch.ops.lcikernels_cpp.use_instruction_set("sse9")


@compiled
def test_cuda_kernels_say_why_they_cannot_run():
    x = torch.zeros(1)
    assert extension.on_cuda("gated_rms_norm_forward", x).startswith("not compiled: LCIKERNELS_BUILD=cuda")
    why = extension.on_cuda("kronecker_expand_forward", x)
    assert why == "it runs on a GPU, x is on cpu" or why.startswith("not compiled")


def test_sources_that_hide_a_compiled_copy_say_so(tmp_path, monkeypatch):
    """As after a regular installation, where Python is started in the folder that it was made from."""
    for folder in ("sources", "site"):
        (tmp_path / folder / "lcikernels").mkdir(parents=True)
    library = tmp_path / "sources/lcikernels/_C.so"
    monkeypatch.setattr(sys, "path", [str(tmp_path / "sources"), str(tmp_path / "site")])
    assert extension.load(library).startswith("not compiled: ")
    (tmp_path / "site/lcikernels/_C.so").touch()
    assert extension.load(library) == (
        f"{library.parent} is not compiled, and hides {tmp_path}/site/lcikernels, which is: start Python in "
        "another folder, or compile this one: pip install --no-build-isolation -e ."
    )


def test_a_library_that_is_missing_or_broken_is_a_reason(tmp_path):
    assert "LCIKERNELS_BUILD=cpu" in extension.load(tmp_path / "_C.so")
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert f"{tmp_path / '_C.so'} does not load" in extension.load(tmp_path / "_C.so")


@pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux only")
def test_the_library_calls_no_python():
    """So it serves every Python: nothing in it asks for a Py* symbol."""
    library = extension.LIBRARY
    if not library.exists():
        pytest.skip("not compiled")
    assert not re.search(rb"\0_?Py[A-Z_]\w{3,}\0", library.read_bytes())


@compiled
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm of binutils")
def test_the_library_asks_torch_for_its_stable_functions_alone():
    """So it serves every torch from 2.10 on: no name of C++, which changes from one to the next."""
    asked = subprocess.check_output(["nm", "-D", "--undefined-only", extension.LIBRARY], text=True)
    names = {line.split()[-1] for line in asked.splitlines()}
    others = {name for name in names if "@" not in name}  # without a version: neither libc nor libstdc++
    linker = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert "torch_call_dispatcher" in others
    assert [x for x in others - linker if not x.startswith(("aoti_torch_", "torch_"))] == []
