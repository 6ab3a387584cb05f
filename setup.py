"""Builds csrc to lcikernels/_C.so. LCIKERNELS_BUILD=auto (all this machine can) | cuda | cpu | none: what is
left out is printed. TORCH_CUDA_ARCH_LIST picks the GPUs: "8.0;9.0;10.0+PTX" as far as nvcc knows them.
MAX_JOBS: how many compilers run at once."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command import bdist_wheel, build_ext

MODE = os.environ.get("LCIKERNELS_BUILD", "auto")
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "")
NVCC = shutil.which("nvcc") or shutil.which(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc")
JOBS = ["-j", x] if (x := os.environ.get("MAX_JOBS")) else []  # else as many as ninja sees processors
LEAVE_OUT = print if MODE in ("auto", "none") else sys.exit  # kernels that were asked for are not left out
CPP, CPU, CUDA, CUDA_CPP = (
    sorted(Path("csrc").glob(x)) for x in ("*.cpp", "cpu/**/*.cpp", "cuda/**/*.cu", "cuda/**/*.cpp")
)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
ISAS = {"base": "", "avx2": "-mavx2 -mfma", "avx512": AVX512}
# On top of these where the compiler knows them, for kernels with instructions for products of bfloat16.
PRODUCTS = {
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
WITH_PRODUCTS = [x for x in CPU if x.parent.name == "retention" and x.stem != "step"]
WITH_PRODUCTS += [x for x in CPU if x.stem == "kronecker_expand"]
RULES = """builddir = build
rule compile
  command = $with -std=c++17 -O3 -MD -MF $out.d -c $in -o $out  # by $tools
  depfile = $out.d
rule cuda
  command = $with -std=c++17 -O3 -MD -MF $out.d -c $in -o $out -Xptxas -v >$out.log 2>&1 || $
      { cat $out.log; false; }  # by $tools
  depfile = $out.d
rule link
  command = $with -shared $in -o $out -Xlinker --no-as-needed -ltorch -ltorch_cpu
"""


def gpus() -> str:
    known, flags = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split(), ""
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";"):
        sm, ptx, _ = arch.replace(".", "").partition("+PTX")
        if f"compute_{sm.rstrip('af')}" in known:
            real = "90a" if sm == "90" else sm  # or nvcc would not know its products of warp groups
            flags += f" -gencode arch=compute_{real},code=sm_{real}" + " -DWITH_WARP_GROUPS" * (real == "90a")
            flags += ptx and f" -gencode arch=compute_{sm},code=compute_{sm}"
        else:
            print(f"lcikernels: left out GPUs of compute capability {arch}: {NVCC} does not know them")
    return flags or sys.exit(f"lcikernels: {NVCC} knows no GPU in TORCH_CUDA_ARCH_LIST")


def named(source: Path) -> str:
    """Its object: csrc/cpu/retention/step.cpp is retention.step."""
    folders = source.parts[2:-1]
    return ".".join((*folders, source.stem))


def known(flags: str) -> bool:
    """To the compiler."""
    command = f"{CXX} {flags} -fsyntax-only -x c++ /dev/null"
    return not subprocess.run(command, shell=True, capture_output=True, check=False).returncode


class Build(build_ext.build_ext):
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
        cxx, linker = f"{CXX} -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000", CXX
        x86 = os.uname().machine == "x86_64"
        products = [isa for isa, flags in PRODUCTS.items() if x86 and known(flags)]
        headers = f"{cxx} -isystem {home}/include" + "".join(f" -DWITH_{isa.upper()}" for isa in products)
        jobs = {f"{named(x)}.o": (x, headers) for x in CPP}
        for isa in ISAS if x86 else ["base"]:
            jobs |= {f"{named(x)}.{isa}.o": (x, f"{cxx} {ISAS[isa]}") for x in CPU}
        for isa in products:
            jobs |= {f"{named(x)}.{isa}.o": (x, f"{cxx} {PRODUCTS[isa]}") for x in WITH_PRODUCTS}
        if CUDA and MODE != "cpu" and not NVCC:
            print("lcikernels: left out the CUDA kernels: no nvcc in PATH or CUDA_HOME")
        elif CUDA and MODE != "cpu":
            linker = f"{nvcc} -Xcompiler -fPIC,-fvisibility=hidden{gpus()}"  # with the CUDA runtime, static
            jobs |= {f"{named(x)}.cuda.o": (x, headers) for x in CUDA_CPP}
            jobs |= {f"{named(x)}.cu.o": (x, linker) for x in CUDA}
        tools = subprocess.getoutput(f"echo $({CXX} --version|head -1) $({NVCC or ':'} --version|tail -1)")
        plan = f"{RULES}tools = torch {torch.__version__}, {tools}\n"  # with others ninja compiles again
        for o, (x, y) in jobs.items():
            plan += f"build build/{o}: {'cuda' if x.suffix == '.cu' else 'compile'} {x}\n  with = {y}\n"
        plan += f"build build/_C.so: link build/{' build/'.join(jobs)}\n  with = {linker} -L{home}/lib\n"
        target = Path(self.get_ext_fullpath(ext.name))
        self.mkpath("build")
        self.mkpath(f"{target.parent}")
        Path("build/build.ninja").write_text(plan)
        target.unlink(missing_ok=True)
        start = time.monotonic()
        if subprocess.run([ninja, *JOBS, "-f", "build/build.ninja"], check=False).returncode:
            return LEAVE_OUT("lcikernels: no compiled kernels: the compiler failed (see above)")
        shutil.copy("build/_C.so", target)
        seconds = time.monotonic() - start
        print(f"lcikernels: built {target} of {', '.join(jobs)} in {seconds:.0f} s", flush=True)


class Wheel(bdist_wheel.bdist_wheel):
    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # of older modules
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform, library = super().get_tag()[2], Path(self.bdist_dir, "lcikernels/_C.so")
        newer = rb"\0GLIBC_2\.(29|[3-9]\d)|\0GLIBCXX_3\.4\.(2[5-9]|[3-9]\d)|\0CXXABI_1\.3\.1[2-9]"
        if library.exists() and not re.search(newer, library.read_bytes()):
            platform = re.sub("^linux", "manylinux_2_28", platform)  # as torch's own wheels
        return ("py3", "none", platform)


if JOBS and not re.fullmatch("[1-9][0-9]*", JOBS[1]):
    sys.exit(f"lcikernels: MAX_JOBS must be a whole number of at least 1, got {JOBS[1]!r}")
why = {  # the last that holds
    MODE == "cuda" and not NVCC: "no nvcc: install the CUDA toolkit and put it in PATH or CUDA_HOME",
    not shutil.which(CXX.partition(" ")[0]): "no C++ compiler: install g++, or name one in CXX",
    sys.platform != "linux": f"they are built on Linux only, this is {sys.platform}",
    MODE == "none": "LCIKERNELS_BUILD=none",
    MODE not in ("auto", "cuda", "cpu", "none"): f"LCIKERNELS_BUILD must be auto|cuda|cpu|none, got {MODE!r}",
}.get(True)
if why:
    LEAVE_OUT(f"lcikernels: no compiled kernels: {why}")
if {"build_ext", "editable_wheel"} & set(sys.argv):
    Path("lcikernels/_C.so").unlink(missing_ok=True)  # or an older one would stay where this build has none
kernels = [] if why else [Extension("lcikernels._C", [], optional=MODE == "auto")]
setup(ext_modules=kernels, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
