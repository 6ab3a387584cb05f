"""Builds csrc into lcikernels/_C.so with ninja; everything else about the package is in pyproject.toml.

LCIKERNELS_BUILD=auto (default: what this machine can, saying what it left out) | cuda | cpu | none (only Python).
TORCH_CUDA_ARCH_LIST picks the GPUs, default "8.0;9.0;10.0+PTX" as far as nvcc knows them.
"""

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
ISAS = {"base": ""}
if platform.machine() == "x86_64":
    ISAS |= {"avx2": "-mavx2 -mfma", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"}
RULES = """
flags = -std=c++17 -O3 -MMD -MF
hidden = -fPIC -fvisibility=hidden
rule torch
  command = {cxx} $flags $out.d $hidden -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem {torch}/include -c $in -o $out
  depfile = $out.d
rule cpu
  command = {cxx} $flags $out.d $hidden -fno-math-errno -fno-trapping-math $isa -c $in -o $out
  depfile = $out.d
rule cuda
  command = {nvcc} $flags $out.d -Xcompiler -fPIC,-fvisibility=hidden {arch} -c $in -o $out
  depfile = $out.d
rule link
  command = {cxx} -shared $in -o $out -L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--as-needed {cudart}
"""  # noqa: E501


def say(what: str) -> None:
    print(f"lcikernels: {what}", flush=True)


def stop(why: str) -> None:
    sys.exit(f"lcikernels: {why}")


def arch_flags() -> str:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST."""
    known = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split()
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";"):
        sm = arch.removesuffix("+PTX").replace(".", "")
        if f"compute_{sm.rstrip('af')}" not in known:
            say(f"left out GPUs of compute capability {arch}: {NVCC} does not know them")
            continue
        codes = f"sm_{sm},compute_{sm}" if arch.endswith("+PTX") else f"sm_{sm}"
        flags.append(f"-gencode arch=compute_{sm},code=[{codes}]")
    return " ".join(flags)


class Build(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # the library calls no Python: no version in its name

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError:
            stop("building needs torch's headers: pip install torch, then pip install --no-build-isolation .")
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
            stop(f"building needs torch 2.10 or newer, this is {torch.__version__}")
        ninja = shutil.which("ninja") or shutil.which(Path(sys.executable).with_name("ninja"))
        if not ninja:
            stop("building needs ninja: pip install ninja")
        edges = {f"{path.stem}.o": f"torch {path}" for path in ROOT.glob("csrc/*.cpp")}
        for path in ROOT.glob("csrc/cpu/*.cpp"):
            edges |= {f"{path.stem}.{isa}.o": f"cpu {path}\n  isa = {flags}" for isa, flags in ISAS.items()}
        fill = {"cxx": CXX, "nvcc": NVCC, "arch": "", "cudart": "", "torch": Path(torch.__file__).parent}
        if (kernels := list(ROOT.glob("csrc/cuda/*.cu"))) and MODE != "cpu" and not NVCC:
            say("left out the CUDA kernels: no nvcc in PATH or CUDA_HOME")
        elif kernels and MODE != "cpu":
            edges |= {f"{path.stem}.cu.o": f"cuda {path}" for path in kernels}
            cudart = f"-L{Path(NVCC).resolve().parents[1]}/lib64 -lcudart_static -ldl -lpthread -lrt"
            fill |= {"arch": arch_flags(), "cudart": cudart}
        objects = " ".join(sorted(edges))
        lines = [f"build {output}: {edge}" for output, edge in edges.items()] + [f"build _C.so: link {objects}", ""]
        target, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(RULES.format(**fill) + "\n".join(lines))
        if subprocess.run([ninja, "-C", work], check=False).returncode:
            stop("the compiler failed (see above); LCIKERNELS_BUILD=none installs without compiled kernels")
        shutil.copy(work / "_C.so", target)
        say(f"built {target} from {objects}")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


missing = (
    "LCIKERNELS_BUILD=none" if MODE == "none"
    else f"they are built on Linux only, this is {sys.platform}" if sys.platform != "linux"
    else None if CXX else "no C++ compiler: install g++, or name one in CXX"
)  # fmt: skip
if MODE not in ("auto", "cuda", "cpu", "none"):
    stop(f"LCIKERNELS_BUILD must be auto, cuda, cpu or none, got {MODE!r}")
if missing and MODE in ("cuda", "cpu"):
    stop(f"cannot build the compiled kernels: {missing}")
if MODE == "cuda" and not NVCC:
    stop("LCIKERNELS_BUILD=cuda needs nvcc: install the CUDA toolkit and put it in PATH or CUDA_HOME")
if missing:
    say(f"left out the compiled kernels: {missing}")
extensions = [] if missing else [Extension("lcikernels._C", [])]
setup(ext_modules=extensions, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
