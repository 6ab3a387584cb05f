"""What nvcc makes of the CUDA source of LiGO's expansion."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
ARCHS = ["sm_80", "sm_90a", "sm_100"]
KERNELS = 42  # 21 products by warps, 12 by warp groups, 6 mixes, 3 totals


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An object with the kernels for every GPU, and what ptxas said: the build's where there is one."""
    if not NVCC:
        pytest.skip("needs nvcc")
    sources = [*ROOT.glob("csrc/cuda/*")]
    built, log = ROOT / "build/kronecker_expand.cu.o", ROOT / "build/kronecker_expand.cu.o.log"
    if log.exists() and built.exists():
        fresh = log.stat().st_mtime > max(source.stat().st_mtime for source in sources)
        if fresh and {*re.findall(r"for '(sm_\w+)'", log.read_text())} == {*ARCHS}:
            return built, log.read_text()
    made = tmp_path_factory.mktemp("nvcc") / "kernels.o"
    archs = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
    archs += ["-DWITH_WARP_GROUPS"]
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", *archs, "-c"]
    done = subprocess.run(
        [*command, ROOT / "csrc/cuda/kronecker_expand.cu", "-o", made],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return made, done.stdout + done.stderr


def test_no_kernel_spills_on_any_gpu_or_has_more_shared_memory_than_there_is(compiled):
    entries = re.split(r"Compiling entry function ", compiled[1])[1:]
    kernels = [re.match(r"'(\S+)' for '(sm_\w+)'", entry).groups() for entry in entries]
    assert len(kernels) == len({*kernels}) == KERNELS * len(ARCHS) and {arch for _, arch in kernels} == {
        *ARCHS
    }
    for kernel, entry in zip(kernels, entries):
        assert "0 bytes spill stores, 0 bytes spill loads" in entry, kernel
        assert "0 bytes stack frame" in entry, kernel
    (stages,) = re.findall(r"STAGES = (\d+), STAGE_BYTES = 64", (ROOT / "csrc/cuda/product.cuh").read_text())
    assert int(stages) * 2 * 128 * 64 <= 163 << 10, "an A100's"
    assert "C75" not in compiled[1], "ptxas tells of products of warp groups that it has wait for each other"


# What multiplies: the enumerator's value in a kernel's name, and its instruction.
INSTRUCTIONS = {
    "0": "HMMA.16816.F32.BF16",
    "1": "HMMA.16816.F32",
    "2": "HMMA.1688.F32.TF32",
    "3": "FFMA",
}


@pytest.fixture(scope="module")
def machine_code(compiled):
    """{(arch, kernel's name): its instructions}."""
    tools = pytest.importorskip("triton.backends.nvidia")
    tool = shutil.which("cuobjdump") or Path(tools.__file__).with_name("bin") / "cuobjdump"
    code = subprocess.check_output([tool, "-sass", compiled[0]], text=True)
    kernels = {}
    for of_arch in re.split(r"\n\tcode for |\narch = ", code)[1:]:
        for kernel in re.split(r"Function : ", of_arch)[1:]:
            kernels[of_arch.split()[0], kernel.split()[0]] = kernel
    return kernels


def test_machine_code_has_the_tensor_core_instructions_meant_and_no_others(machine_code):
    kinds = set()
    for (arch, kernel), code in machine_code.items():
        name = re.match(r"\S*7productILNS_10ArithmeticE(\d)ELi(\d+)E", kernel)
        if not name:
            assert re.search("3mix|5total|13group_product", kernel)
            continue
        products = re.findall(r"\b(HMMA\.[\w.]+|FFMA)\b", code)
        want = INSTRUCTIONS[name[1]]
        assert {*products} == {want}, (arch, kernel)
        # 64 or 16 of them make a warp's quarter of a stage; without tensor cores 512.
        assert products.count(want) == (512 if want == "FFMA" else 64 if name[2] == "128" else 16)
        assert "LDGSTS" in code and (want == "FFMA" or "LDSM" in code or want.endswith("TF32"))
        kinds.add((arch, name[1]))
    assert kinds == {(arch, kind) for arch in ARCHS for kind in INSTRUCTIONS}


def loop(code):
    """The instructions of the innermost loop around the products of warp groups."""
    lines = [(int(at, 16), said) for at, said in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", code)]
    inside = [at for at, said in lines if said.startswith("HGMMA")]
    backward = [(int(to[1], 16), at) for at, said in lines if (to := re.search(r"BRA .*(0x[0-9a-f]+)", said))]
    first, last = max((to, at) for to, at in backward if to <= inside[0] and at >= inside[-1])
    return [said for at, said in lines if first <= at <= last]


def test_products_of_warp_groups_wait_once_a_stage_and_for_the_one_before(machine_code):
    kernels = {kernel: code for kernel, code in machine_code.items() if "13group_product" in kernel[1]}
    assert len(kernels) == 12 * len(ARCHS)
    for (arch, kernel), code in kernels.items():
        if arch != "sm_90a":
            assert "MMA" not in code and "LDGSTS" not in code, "nothing that launch.cuh could choose"
            continue
        kind, columns = re.search(r"ArithmeticE(\d)ELi(\d+)E", kernel).groups()
        inside = loop(code)
        products = [said for said in inside if "HGMMA" in said]
        assert code.count("HGMMA") == len(products) == 4, "64 deep"
        assert all(f"HGMMA.64x{columns}x16.F32{'.BF16' * (kind == '0')} " in said for said in products)
        waits = [said for said in inside if "WARPGROUP.DEPBAR" in said]
        assert sum("gsb0" in said for said in products) == 1 and len(waits) == 1 and "0x1" in waits[0]
        assert sum("BAR.SYNC" in said for said in inside) == sum("FENCE.VIEW.ASYNC" in x for x in inside) == 1
        registers, blocks = (255, 1) if columns == "256" else (128, 2)
        assert max(int(r) for r in re.findall(r"\bR(\d+)\b", code)) < registers
        stages = {"256": 4, "128": 3}[columns]  # as in GroupTile
        assert blocks * (stages * (128 + int(columns)) * 128 + 1024) <= 228 << 10, "an H200's"
