"""setup.py on a package of a few lines: what it builds, what it leaves out, and what it says."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lcikernels import extension

ROOT = Path(__file__).resolve().parents[1]
KERNEL = """
#include "kernel.h"
#if defined(__AVX512F__)
extern "C" __attribute__((visibility("default"))) int avx512_kernel() { return ANSWER + 512; }
#elif defined(__AVX2__) && defined(__FMA__)
extern "C" __attribute__((visibility("default"))) int avx2_kernel() { return ANSWER + 256; }
#else
extern "C" __attribute__((visibility("default"))) int base_kernel() { return ANSWER + 128; }
#endif
"""
CUDA_KERNEL = """
__global__ void add_one(float* x) { x[threadIdx.x] += 1; }
extern "C" __attribute__((visibility("default"))) int cuda_kernel(float* x) {
  add_one<<<1, 32>>>(x);
  return (int)cudaGetLastError();
}
"""
LIBRARY = "#include <torch/csrc/stable/library.h>\nSTABLE_TORCH_LIBRARY(setup_test, m) {}\n"
CXX = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)

compiler = pytest.mark.skipif(
    sys.platform != "linux" or not CXX,
    reason="needs Linux and a C++ compiler",
)


@pytest.fixture
def package(tmp_path):
    """In a folder whose name ninja and a shell would read otherwise."""
    tmp_path = tmp_path / "a $b 'c"
    tmp_path.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc/cpu", "lcikernels", "growth"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("README.md", "lcikernels/__init__.py", "growth/__init__.py"):
        (tmp_path / name).touch()
    (tmp_path / "csrc/library.cpp").write_text(LIBRARY)
    (tmp_path / "csrc/cpu/kernel.cpp").write_text(KERNEL)
    (tmp_path / "csrc/cpu/kernel.h").write_text("#define ANSWER 0\n")
    shutil.copy(ROOT / "csrc/portable.cpp", tmp_path / "csrc")
    return tmp_path


def run(package, *command, **changes):
    """setup.py's exit status and what it printed; an environment variable of None is removed."""
    env = {name: x for name, x in {**os.environ, **changes}.items() if x is not None}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "--quiet", *command],
        cwd=package, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def no_compiler(package):
    """An environment in which no compiler can be found."""
    (package / "bin").mkdir(exist_ok=True)
    return {"PATH": str(package / "bin"), "CXX": None, "CUDA_HOME": str(package)}


def pretend(package, source):
    """An environment in which `import torch` runs `source`."""
    (package / "pretend/torch").mkdir(parents=True)
    (package / "pretend/torch/__init__.py").write_text(source)
    return {"PYTHONPATH": str(package / "pretend")}


def test_an_unknown_mode_is_refused(package):
    why = "lcikernels: no compiled kernels: LCIKERNELS_BUILD must be auto|cuda|cpu|none, got 'gpu'\n"
    assert run(package, "build", LCIKERNELS_BUILD="gpu") == (1, why)


def test_none_makes_a_wheel_for_every_platform(package):
    status, said = run(package, "bdist_wheel", LCIKERNELS_BUILD="none")
    assert status == 0 and "lcikernels: no compiled kernels: LCIKERNELS_BUILD=none" in said
    assert [wheel.name for wheel in package.glob("dist/*")] == ["lcikernels-0.1.0-py3-none-any.whl"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the reason is the platform")
def test_without_a_compiler_auto_goes_on_and_cpu_stops(package):
    env = no_compiler(package)
    why = "lcikernels: no compiled kernels: no C++ compiler: install g++, or name one in CXX\n"
    for cxx in None, "g++-99 -pipe":
        env |= {"CXX": cxx}
        assert run(package, "build_ext", "--inplace", LCIKERNELS_BUILD="auto", **env) == (0, why)
        assert run(package, "build_ext", "--inplace", LCIKERNELS_BUILD="cpu", **env) == (1, why)
    assert not (package / "lcikernels/_C.so").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux only")
@pytest.mark.parametrize("mode", ["none", "auto"])
def test_where_nothing_is_built_no_older_library_stays(package, mode):
    (package / "lcikernels/_C.so").touch()
    assert run(package, "build_ext", "--inplace", LCIKERNELS_BUILD=mode, **no_compiler(package))[0] == 0
    assert not (package / "lcikernels/_C.so").exists()


@compiler
def test_cuda_without_nvcc_says_what_to_install(package):
    env = no_compiler(package) | {"CXX": CXX}
    status, said = run(package, "build_ext", LCIKERNELS_BUILD="cuda", **env)
    assert status == 1
    assert said.endswith("no nvcc: install the CUDA toolkit and put it in PATH or CUDA_HOME\n")


@compiler
def test_gpus_that_nvcc_does_not_know_are_an_error(package):
    (package / "csrc/cuda").mkdir()
    (package / "csrc/cuda/kernel.cu").write_text(CUDA_KERNEL)
    env = no_compiler(package) | {"CXX": CXX}
    (package / "bin/nvcc").write_text("#!/bin/sh\necho compute_90\n")
    (package / "bin/nvcc").chmod(0o755)
    env |= pretend(package, "__version__ = '2.10.0'")
    (package / "bin/ninja").touch(0o755)
    status, said = run(package, "build_ext", LCIKERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="77.0", **env)
    assert status == 1 and "left out GPUs of compute capability 77.0" in said
    assert said.endswith(f"lcikernels: {package}/bin/nvcc knows no GPU in TORCH_CUDA_ARCH_LIST\n")


@compiler
def test_ninja_starts_as_many_compilers_as_max_jobs_says(package):
    env = no_compiler(package) | {"CXX": CXX} | pretend(package, "__version__ = '2.10.0'")
    (package / "bin/ninja").write_text('#!/bin/sh\necho ninja "$@"\n: >build/_C.so\n')
    (package / "bin/ninja").chmod(0o755)
    for jobs, words in (("3", "-j 3 -f"), (None, "-f"), ("", "-f")):
        status, said = run(package, "build_ext", "--inplace", LCIKERNELS_BUILD="cpu", MAX_JOBS=jobs, **env)
        assert status == 0 and f"ninja {words} build/build.ninja\n" in said, said
    for jobs in ("0", "many", "-1"):
        why = f"lcikernels: MAX_JOBS must be a whole number of at least 1, got {jobs!r}\n"
        assert run(package, "build", MAX_JOBS=jobs) == (1, why)


@compiler
@pytest.mark.parametrize(
    "source, said",
    {
        "raise ImportError": "needs torch's headers: pip install torch, then use --no-build-isolation",
        "__version__ = '2.9.1'": "building needs torch 2.10 or newer, this is 2.9.1",
    }.items(),
    ids=["no torch", "an old torch"],
)
def test_torch_that_is_missing_or_too_old_is_one_line(package, source, said):
    env = pretend(package, source)
    assert run(package, "build_ext", LCIKERNELS_BUILD="cpu", **env) == (1, f"lcikernels: {said}\n")


@compiler
def test_what_does_not_compile_stops_cpu_and_is_left_out_by_auto(package):
    (package / "csrc/library.cpp").write_text("no C++")
    (package / "csrc/cpu/kernel.cpp").unlink()
    for mode, want in ("cpu", 1), ("auto", 0):
        (package / "lcikernels/_C.so").touch()
        status, said = run(package, "build_ext", "--inplace", LCIKERNELS_BUILD=mode)
        assert status == want and "csrc/library.cpp:1:1: error" in said
        assert said.endswith("lcikernels: no compiled kernels: the compiler failed (see above)\n")
        assert not (package / "lcikernels/_C.so").exists()


@compiler
def test_one_library_holds_every_instruction_set_and_any_python_loads_it(package):
    status, said = run(package, "bdist_wheel", LCIKERNELS_BUILD="cpu")
    assert status == 0 and "lcikernels: built " in said, said
    (wheel,) = package.glob("dist/*.whl")
    assert wheel.name == f"lcikernels-0.1.0-py3-none-manylinux_2_28_{platform.machine()}.whl"
    library = zipfile.ZipFile(wheel).extract("lcikernels/_C.so", package / "unpacked")
    kernels = {"base_kernel": 128}
    if platform.machine() == "x86_64":
        kernels |= {"avx2_kernel": 256, "avx512_kernel": 512}
    loaded = ctypes.CDLL(library)
    assert {name: loaded[name]() for name in kernels} == kernels
    torch.ops.load_library(library)


@compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_kernels_are_built_without_a_gpu_for_the_architectures_asked_for(package):
    (package / "csrc/cuda").mkdir()
    (package / "csrc/cuda/kernel.cu").write_text(CUDA_KERNEL)
    shutil.copy(ROOT / "csrc/cuda/cudart.cpp", package / "csrc/cuda")
    archs = {"LCIKERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0+PTX;77.0"}
    status, said = run(package, "build_ext", "--inplace", **archs)
    assert status == 0 and "left out GPUs of compute capability 77.0" in said, said
    library = package / "lcikernels/_C.so"
    assert ctypes.CDLL(library)["cuda_kernel"]
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "[libtorch.so]" in needed, "through which a CUDA torch's current stream is found"
    assert "[libtorch_cpu.so]" in needed and "cuda" not in needed
    rules = (package / "build/build.ninja").read_text()
    assert "arch=compute_90a,code=sm_90a -DWITH_WARP_GROUPS -gencode arch=compute_90,code=compute_90" in rules
    assert "77" not in rules
    assert "add_one" in (package / "build/kernel.cu.o.log").read_text(), "what ptxas says of each kernel"
    status, said = run(package, "build_ext", "--inplace", LCIKERNELS_BUILD="cpu")
    assert status == 0
    with pytest.raises(AttributeError, match="cuda_kernel"):
        copy = shutil.copy(library, package / "cpu_only.so")
        ctypes.CDLL(copy)["cuda_kernel"]


@compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_a_cuda_kernel_that_does_not_compile_says_where(package):
    (package / "csrc/cuda").mkdir()
    (package / "csrc/cuda/kernel.cu").write_text("no CUDA")
    status, said = run(package, "build_ext", "--inplace", LCIKERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0")
    assert status == 1 and "csrc/cuda/kernel.cu(1): error" in said


def compiled(package, **changes):
    """The objects that one more build makes again."""
    status, said = run(package, "build_ext", "--inplace", LCIKERNELS_BUILD="cpu", **changes)
    assert status == 0, said
    return set(re.findall(r"-o build/(\S+)\.o ", said))


@compiler
def test_what_changed_is_compiled_again_and_nothing_else(package):
    (package / "csrc/library.cpp").write_text("")
    isas = ("base", "avx2", "avx512") if platform.machine() == "x86_64" else ("base",)
    kernels = {f"kernel.{isa}" for isa in isas}
    fake = package / "g++"
    fake.write_text(f'#!/bin/sh\n[ "$1" != --version ] || exec cat "$0.version"\nexec {CXX} "$@"\n')
    fake.chmod(0o755)
    version = package / "g++.version"
    version.write_text("g++ 12.2.0")
    env = {"CXX": "./g++"}
    assert compiled(package, **env) == {"library", "portable", *kernels}
    assert compiled(package, **env) == set()
    (package / "csrc/cpu/kernel.h").write_text("#define ANSWER 1000\n")
    assert compiled(package, **env) == kernels
    assert ctypes.CDLL(package / "lcikernels/_C.so")["base_kernel"]() == 1128
    version.write_text("g++ 13.1.0")
    assert compiled(package, **env) == {"library", "portable", *kernels}
    assert compiled(package, CXX=CXX) == {"library", "portable", *kernels}


@pytest.mark.skipif(not extension.LIBRARY.exists(), reason="not compiled")
def test_the_library_loads_wherever_the_wheels_of_torch_do():
    """They are manylinux_2_28: glibc 2.28, and GCC 8's libstdc++."""
    asks = re.findall(rb"\0(GLIBC_2|GLIBCXX_3\.4|CXXABI_1\.3)\.(\d+)", extension.LIBRARY.read_bytes())
    newest = {b"GLIBC_2": 28, b"GLIBCXX_3.4": 24, b"CXXABI_1.3": 11}
    assert {name for name, _ in asks} == set(newest)
    assert [(name, minor) for name, minor in asks if int(minor) > newest[name]] == []


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs a cross compiler for aarch64")
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/**/*.cpp")), ids=lambda source: source.name)
def test_every_source_compiles_for_aarch64(source, tmp_path):
    headers = Path(torch.__file__).parent / "include"
    flags = "-std=c++17 -fPIC -Wall -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem".split()
    command = ["aarch64-linux-gnu-g++", *flags, headers, "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
