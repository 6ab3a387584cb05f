"""The kernels as they are compiled for ARM: NEON, run by an emulator, against plain loops in float64.

Runs where a cross-compiler and QEMU are installed (Debian: g++-aarch64-linux-gnu qemu-user-static).
"""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc/cpu"
DRIVER = Path(__file__).with_name("every_kernel.cpp")
CXX = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.skipif(not CXX, reason="needs a compiler for ARM: aarch64-linux-gnu-g++")
@pytest.mark.skipif(not EMULATOR, reason="needs an emulator of ARM: qemu-aarch64")
def test_every_kernel_agrees_with_plain_loops_on_arm(tmp_path):
    def compiled(source: Path) -> Path:
        target = tmp_path / f"{source.parent.name}.{source.stem}.o"
        subprocess.run([CXX, "-std=c++17", "-O1", f"-I{CSRC}", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [DRIVER, *CSRC.rglob("*.cpp")]))
    subprocess.run([CXX, "-static", *objects, "-o", tmp_path / "kernels"], check=True)
    done = subprocess.run([EMULATOR, tmp_path / "kernels"], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, [line for line in lines if not line.startswith("ok")]
    assert len(lines) > 100 and all(line.startswith("ok") for line in lines)
