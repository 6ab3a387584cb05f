"""Builds csrc into lcikernels/_C.so with ninja; everything else about the package is in pyproject.toml.
LCIKERNELS_BUILD=auto (default: what this machine can; prints what it left out) | cuda | cpu | none.
TORCH_CUDA_ARCH_LIST picks the GPUs, default "8.0;9.0;10.0+PTX" as far as nvcc knows them."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("LCIKERNELS_BUILD", "auto")
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
NVCC = shutil.which("nvcc") or shutil.which(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc")
LEAVE_OUT = print if MODE in ("auto", "none") else sys.exit  # kernels that were asked for are not left out
CPP, CPU, CUDA = (sorted(Path("csrc").glob(x)) for x in ("*.cpp", "cpu/*.cpp", "cuda/*.cu"))
ISAS = {"base": "", "avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"}
RULES = """rule compile
  command = $with -std=c++17 -O3 -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = $with -shared $in -o $out -Xlinker --no-as-needed -ltorch -ltorch_cpu
"""


def gpus() -> str:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST."""
    known, flags = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split(), ""
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";"):
        sm, ptx, _ = arch.replace(".", "").partition("+PTX")
        if f"compute_{sm.rstrip('af')}" in known:
            flags += f" -gencode arch=compute_{sm},code=[sm_{sm}{ptx and f',compute_{sm}'}]"
        else:
            print(f"lcikernels: left out GPUs of compute capability {arch}: {NVCC} does not know them")
    return flags or sys.exit(f"lcikernels: {NVCC} knows no GPU in TORCH_CUDA_ARCH_LIST")


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # without a Python version: the library calls no Python

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError:
            sys.exit("lcikernels: needs torch's headers: pip install torch, then use --no-build-isolation")
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
            sys.exit(f"lcikernels: building needs torch 2.10 or newer, this is {torch.__version__}")
        if not (ninja := shutil.which("ninja") or shutil.which(Path(sys.executable).with_name("ninja"))):
            sys.exit("lcikernels: building needs ninja: pip install ninja")
        home, nvcc = (shlex.quote(f"{x}").replace("$", "$$") for x in (Path(torch.__file__).parent, NVCC))
        cxx, linker = f"{CXX} -fPIC -fvisibility=hidden", CXX
        stable = f"-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem {home}/include"
        jobs = {f"{x.stem}.o": (x, f"{cxx} {stable}") for x in CPP}
        for isa in ISAS if os.uname().machine == "x86_64" else ["base"]:
            jobs |= {f"{x.stem}.{isa}.o": (x, f"{cxx} {ISAS[isa]}") for x in CPU}
        if CUDA and MODE != "cpu" and not NVCC:
            print("lcikernels: left out the CUDA kernels: no nvcc in PATH or CUDA_HOME")
        elif CUDA and MODE != "cpu":
            flags, linker = f"-Xcompiler -fPIC,-fvisibility=hidden {gpus()}", nvcc  # links the CUDA runtime
            jobs |= {f"{x.stem}.cu.o": (x, f"{nvcc} {flags}") for x in CUDA}
        edges = "".join(f"build build/{o}: compile {x}\n  with = {y}\n" for o, (x, y) in jobs.items())
        edges += f"build build/_C.so: link build/{' build/'.join(jobs)}\n  with = {linker} -L{home}/lib\n"
        target = Path(self.get_ext_fullpath(ext.name))
        Path("build").mkdir(exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        Path("build/build.ninja").write_text(f"builddir = build\n{RULES}{edges}")
        target.unlink(missing_ok=True)
        if subprocess.run([ninja, "-f", "build/build.ninja"], check=False).returncode:
            LEAVE_OUT("lcikernels: no compiled kernels: the compiler failed (see above)")
        else:
            print(f"lcikernels: built {shutil.copy('build/_C.so', target)} of {', '.join(jobs)}", flush=True)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if MODE not in ("auto", "cuda", "cpu", "none"):
    sys.exit(f"lcikernels: LCIKERNELS_BUILD must be auto, cuda, cpu or none, got {MODE!r}")
why = "this version has no CUDA kernels yet" if MODE == "cuda" and not CUDA else None
if MODE == "cuda" and not NVCC:
    why = "no nvcc: install the CUDA toolkit and put it in PATH or CUDA_HOME"
if not CXX:
    why = "no C++ compiler: install g++, or name one in CXX"
if sys.platform != "linux":
    why = f"they are built on Linux only, this is {sys.platform}"
if MODE == "none":
    why = "LCIKERNELS_BUILD=none"
if why:
    LEAVE_OUT(f"lcikernels: no compiled kernels: {why}")
if {"build_ext", "editable_wheel"} & set(sys.argv):
    Path("lcikernels/_C.so").unlink(missing_ok=True)  # or an older one would stay where this build has none
kernels = [] if why else [Extension("lcikernels._C", [], optional=MODE == "auto")]
setup(ext_modules=kernels, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
