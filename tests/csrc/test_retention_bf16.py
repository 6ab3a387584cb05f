"""Retention whose products of bfloat16 have instructions: AVX512_BF16's and AMX's.

AMX's tiles are emulated too, so that what is built for them runs on a processor with AVX512_BF16 alone.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import assert_agrees

from csrc import test_retention
from lcikernels import extension, retention
from lcikernels.ops.retention.reference import retention as reference

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
CXX = shutil.which("g++")
AVX512_BF16 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mavx512bf16"
OPS = torch.ops.lcikernels_cpp

# B, T, Hq, Hk, Hv, K, V. A chunk has 32 tokens, or 64 with AMX; operands are padded to 32 of a depth.
SHAPES = {
    "whole chunks and panels": (1, 128, 2, 2, 2, 64, 64),
    "one of everything": (2, 1, 1, 1, 1, 1, 1),
    "odd everything": (2, 67, 2, 2, 2, 17, 33),
    "one more than chunks and panels": (1, 65, 1, 1, 1, 33, 65),
    "half a panel": (1, 40, 1, 1, 1, 80, 112),
    "V in parts, q and k shared": (1, 40, 1, 1, 2, 8, 96),
    "three heads share q, two share k": (2, 40, 2, 3, 6, 8, 8),
    "several runs of kept states": (1, 650, 1, 1, 1, 4, 4),
}


def compiled_for(name: str) -> str | None:
    """Why this instruction set cannot be used, or None."""
    if extension.WHY_NOT:
        return extension.WHY_NOT
    best = OPS.instruction_set()
    try:
        OPS.use_instruction_set(name)
    except RuntimeError as refusal:
        return str(refusal)
    OPS.use_instruction_set(best)
    return None


def why_no_emulation() -> str | None:
    """Why there are no emulated tiles here, or None."""
    if sys.platform != "linux" or not CXX:
        return "needs Linux and g++"
    return compiled_for("avx512_bf16")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """The library of retention on emulated tiles; its ops are torch.ops.lcikernels_tiles."""
    if reason := why_no_emulation():
        pytest.skip(reason)
    library = tmp_path_factory.mktemp("tiles") / "retention.so"
    command = [CXX, *"-std=c++17 -O2 -fPIC -shared -fvisibility=hidden".split(), *AVX512_BF16.split()]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", TORCH / "include"]
    command += [ROOT / "tests/csrc/retention_on_tiles.cpp", "-o", library]
    command += [f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["avx512_bf16", "amx", "amx, emulated"])
def products(request, monkeypatch):
    """Each way to multiply bfloat16 that this machine has."""
    if request.param == "amx, emulated":
        request.getfixturevalue("tiles")
        monkeypatch.setattr(torch.ops, "lcikernels_cpp", torch.ops.lcikernels_tiles)
        yield request.param
        return
    if reason := compiled_for(request.param):
        pytest.skip(reason)
    best = OPS.instruction_set()
    OPS.use_instruction_set(request.param)
    yield request.param
    OPS.use_instruction_set(best)


def compiled(*tokens, **arguments):
    return retention(*tokens, **arguments, backend="cpp")


def inputs(*shape, per_token=True):
    return test_retention.inputs(*shape, per_token=per_token, dtype=torch.bfloat16)


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(products, shape, per_token, poisoned):
    assert_agrees(compiled, reference, torch.bfloat16, **inputs(*shape, per_token=per_token))


@pytest.mark.parametrize("rate", [-1e-7, -3.0, -40.0, -90.0, -1e4])
def test_every_rate_is_as_exact_as_the_reference(products, rate, poisoned):
    """Decays of 1, and of 4e-18 and 8e-40, in one product with the token's own; and of nothing."""
    whole = inputs(1, 70, 2, 2, 2, 20, 36)
    rates = torch.full_like(whole["log_decay"], rate).requires_grad_()
    assert_agrees(compiled, reference, torch.bfloat16, **whole | {"log_decay": rates})


def test_packed_sequences_are_as_exact_as_the_reference(products, poisoned):
    whole = inputs(1, 150, 2, 2, 2, 24, 40) | {"cu_seqlens": torch.tensor([0, 1, 70, 150])}
    whole["initial_state"] = torch.randn(3, 2, 24, 40, requires_grad=True)
    assert_agrees(compiled, reference, torch.bfloat16, **whole)


def test_what_is_not_asked_for_changes_no_bit(products):
    """Without the gradient of the rates no pair is summed and no state kept."""
    whole = inputs(1, 150, 2, 2, 2, 24, 40)
    leaves = [whole[name] for name in ("q", "k", "v")]
    with_rates = torch.autograd.grad(compiled(**whole)[0].sum(), [*leaves, whole["log_decay"]])
    without = torch.autograd.grad(
        compiled(**whole | {"log_decay": whole["log_decay"].detach()})[0].sum(), leaves
    )
    assert all(torch.equal(x, y) for x, y in zip(with_rates, without))


def test_the_number_of_threads_changes_no_bit(products):
    whole = inputs(1, 300, 1, 1, 2, 8, 96)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(test_retention.run(whole))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.parametrize("where", ["q", "k", "v", "log_decay", "initial_state"])
def test_a_nan_stays_in_its_sequence_and_head(products, where):
    test_retention.assert_a_nan_stays(inputs(2, 70, 2, 2, 2, 5, 70), where)


def test_tiles_are_used_and_given_back(tiles, monkeypatch):
    monkeypatch.setattr(torch.ops, "lcikernels_cpp", torch.ops.lcikernels_tiles)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # this one, which is asked
        before = tiles.tile_products()
        test_retention.run(inputs(1, 70, 2, 2, 2, 20, 36))
    finally:
        torch.set_num_threads(threads)
    assert tiles.tile_products() > before
    assert tiles.tiles_in_use() == 0


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_products_are_where_they_were_asked_for():
    """The library has the instructions of each level that it names, and no sum of a tile leaves its register
    but at the end: as many tiles are stored as are zeroed."""
    if reason := why_no_emulation():
        pytest.skip(reason)
    command = ["objdump", "-d", "--no-show-raw-insn", extension.LIBRARY]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert code.count("vdpbf16ps") and code.count("tdpbf16ps")
    assert code.count("tilestored") == code.count("tilezero")
