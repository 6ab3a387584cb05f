"""Builds csrc into lcikernels/_C.so with ninja; everything else about the package is in pyproject.toml.

LCIKERNELS_BUILD=auto (default: what this machine can; prints what it left out) | cuda | cpu | none.
TORCH_CUDA_ARCH_LIST picks the GPUs, default "8.0;9.0;10.0+PTX" as far as nvcc knows them."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("LCIKERNELS_BUILD", "auto")
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
NVCC = shutil.which("nvcc") or shutil.which(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc")
ISAS = {"base": "", "avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"}
ISAS = ISAS if platform.machine() == "x86_64" else {"base": ""}
RULES = """
rule compile
  command = $with -std=c++17 -O3 -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = $with -shared $in -o $out -Xlinker --no-as-needed -ltorch -ltorch_cpu
"""


def gpus() -> str:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST."""
    known, flags = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split(), ""
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";"):
        sm = arch.removesuffix("+PTX").replace(".", "")
        ptx = f",compute_{sm}" if arch.endswith("+PTX") else ""
        if f"compute_{sm.rstrip('af')}" in known:
            flags += f" -gencode arch=compute_{sm},code=[sm_{sm}{ptx}]"
        else:
            print(f"lcikernels: left out GPUs of compute capability {arch}: {NVCC} does not know them")
    return flags


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
        home, hidden = Path(torch.__file__).parent, "-fPIC -fvisibility=hidden"
        stable = f"{CXX} {hidden} -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem {home}/include"
        jobs = {f"{path.stem}.o": (path, stable) for path in ROOT.glob("csrc/*.cpp")}
        for path in ROOT.glob("csrc/cpu/*.cpp"):
            for isa, flags in ISAS.items():
                jobs[f"{path.stem}.{isa}.o"] = path, f"{CXX} {hidden} {flags}"
        gpu, linker = list(ROOT.glob("csrc/cuda/*.cu")) if MODE != "cpu" else [], CXX
        if gpu and not NVCC:
            print("lcikernels: left out the CUDA kernels: no nvcc in PATH or CUDA_HOME")
        elif gpu:
            jobs |= {f"{path.stem}.cu.o": (path, f"{NVCC} -Xcompiler '{hidden}' {gpus()}") for path in gpu}
            linker = NVCC  # it adds the static CUDA runtime
        edges = [f"build {out}: compile {path}\n  with = {command}" for out, (path, command) in jobs.items()]
        edges.append(f"build _C.so: link {' '.join(sorted(jobs))}\n  with = {linker} -L{home}/lib\n")
        target, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(RULES + "\n".join(edges))
        if subprocess.run([ninja, "-C", work], check=False).returncode:
            sys.exit("lcikernels: the compiler failed (see above); LCIKERNELS_BUILD=none goes without")
        shutil.copy(work / "_C.so", target)
        print(f"lcikernels: built {target} of {', '.join(jobs)}", flush=True)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


lacks = {
    "LCIKERNELS_BUILD=none": MODE == "none",
    f"they are built on Linux only, this is {sys.platform}": sys.platform != "linux",
    "no C++ compiler: install g++, or name one in CXX": not CXX,
    "no nvcc: install the CUDA toolkit and put it in PATH or CUDA_HOME": MODE == "cuda" and not NVCC,
}
if MODE not in ("auto", "cuda", "cpu", "none"):
    sys.exit(f"lcikernels: LCIKERNELS_BUILD must be auto, cuda, cpu or none, got {MODE!r}")
if missing := next((why for why, true in lacks.items() if true), None):
    if MODE in ("cuda", "cpu"):
        sys.exit(f"lcikernels: LCIKERNELS_BUILD={MODE} cannot build the kernels: {missing}")
    print(f"lcikernels: left out the compiled kernels: {missing}")
built = [] if missing else [Extension("lcikernels._C", [])]
setup(ext_modules=built, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
