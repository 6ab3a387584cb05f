"""csrc under g++'s sanitizers: kernels alone, in every_kernel.cpp, and the library with Python around it."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lcikernels import extension

ROOT = Path(__file__).resolve().parents[2]
HERE, KERNELS = ROOT / "tests/csrc", ROOT / "csrc/cpu"
CXX = shutil.which("g++")
MEMORY = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
RACES = (
    "-fsanitize=thread -DTHREADS=2 -DTORCH_TARGET_VERSION=0x020a000000000000 "
    f"-isystem {Path(torch.__file__).parent}/include"
)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
BF16 = f"{AVX512} -mavx512bf16"
# What compiles a build; the build of its kernels without products of bfloat16, the namespace of the others.
BUILDS = {
    "base": ("", "base", "base"),
    "avx2": ("-mavx2 -mfma", "avx2", "avx2"),
    "avx512": (AVX512, "avx512", "avx512"),
    "avx512_bf16": (BF16, "avx512", "avx512_bf16"),
    "amx": (f"{BF16} -mamx-tile -mamx-bf16", "avx512", "amx"),
    "tiles": (f"{BF16} -include {HERE}/tiles_on_cpu.h -D__AMX_BF16__", "avx512", "amx"),  # emulated
}


def run(command, **settings) -> tuple[int, str]:
    """Its exit status, and what it said."""
    settings |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    done = subprocess.run([str(word) for word in command], **settings)
    return done.returncode, done.stdout


def why_not(sanitizer: str, folder: Path) -> str | None:
    """Why nothing can be compiled and run so here, or None."""
    if sys.platform != "linux" or not CXX:
        return "needs Linux and g++"
    command = [CXX, *sanitizer.split(), "-x", "c++", "-", "-o", folder / "empty"]
    failed = run(command, input="int main() {}")[0] or run([folder / "empty"])[0]
    return f"nothing of g++ {sanitizer.split()[0]} runs here" if failed else None


def cannot_run(build: str) -> str | None:
    """Why this machine cannot run a build, or None."""
    if extension.WHY_NOT or build == "base":
        return extension.WHY_NOT
    needed, ops = build.replace("tiles", "avx512_bf16"), torch.ops.lcikernels_cpp
    best = ops.instruction_set()
    try:
        ops.use_instruction_set(needed)
    except RuntimeError as refusal:
        return str(refusal)
    ops.use_instruction_set(best)
    return None


def sources(build: str) -> list[Path]:
    """Those that setup.py compiles for it."""
    every = sorted(KERNELS.rglob("*.cpp"))
    if BUILDS[build][1] == build:
        return every
    of_retention = [x for x in every if x.parent.name == "retention" and x.stem != "step"]
    return [*of_retention, KERNELS / "kronecker_expand.cpp"]


def program(folder: Path, build: str, flags: str, only: str = "") -> Path:
    """every_kernel.cpp with a build's kernels, or those whose path has one of the words in `only`. Objects
    that are there, named as setup.py names them, are taken."""
    plain, products = BUILDS[build][1:]
    driver = f"-DKERNELS={plain} -DPRODUCTS={products} -DROUNDED={int(plain != products)} -I{KERNELS}"
    jobs = {folder / f"{build}.o": (HERE / "every_kernel.cpp", driver)}
    for each in dict.fromkeys((plain, build)):
        for source in sources(each):
            name = ".".join(source.relative_to(KERNELS).with_suffix("").parts)
            if not only or any(word in name for word in only.split()):
                jobs[folder / f"{name}.{each}.o"] = (source, BUILDS[each][0])

    def compiled(target: Path) -> None:
        source, own = jobs[target]
        command = [CXX, *f"-std=c++17 -g1 -pthread {flags} {own}".split(), "-c", source, "-o", target]
        if not target.exists():
            failed, said = run(command)
            assert not failed, said

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compiled, jobs))
    missing = ["-no-pie", "-Wl,--unresolved-symbols=ignore-all"] if only else []
    failed, said = run([CXX, *flags.split(), "-pthread", *missing, *jobs, "-o", folder / build])
    assert not failed, said
    return folder / build


def assert_clean(kernels: Path, *ops: str) -> None:
    """Every check holds, and no sanitizer says anything."""
    failed, said = run([kernels, *ops])
    lines = said.splitlines()
    wrong = [line for line in lines if not line.startswith("ok")]
    assert not failed and lines and not wrong, "\n".join(wrong[:60] or lines[-1:])


def assert_seen(fault: str, kernels: Path, *ops: str) -> None:
    """A fault that is planted is reported, in a kernel, which reports may name without its file."""
    planted = {"short": "heap-buffer-overflow", "twice": "data race"}
    namespaces = BUILDS[kernels.name][1:]
    failed, said = run([kernels, fault, *ops], env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"})
    assert failed and planted[fault] in said and any(f" {x}::" in said for x in namespaces), said[-4000:]


def checkout(folder: Path) -> dict[str, str]:
    """Makes a copy of this one whose library is sanitized, and so is what its tests compile by g++. Returns
    the environment that its tests need: no leaks are looked for, as Python and torch keep what they have."""
    compiler, left_out = folder / "bin/g++", shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "lcikernels", "growth", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {CXX} "$@" -O1 -g1 {MEMORY}\n')
    compiler.chmod(0o755)
    path = f"{compiler.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "CXX": f"{compiler}", "PYTHONPATH": f"{folder}"}
    env["LCIKERNELS_BUILD"] = "cpu"
    failed, said = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=env)
    assert not failed and (folder / "lcikernels/_C.so").exists(), said[-4000:]
    first = [run([CXX, f"-print-file-name={name}.so"])[1].strip() for name in ("libasan", "libstdc++")]
    return env | {"LD_PRELOAD": " ".join(first), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
