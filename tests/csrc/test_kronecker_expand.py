"""The CUDA source of LiGO's expansion, kernels and all, on a CPU."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tolerance import assert_agrees

from lcikernels import extension, kronecker_expand
from lcikernels.backends import TABLES, Backend, anywhere
from lcikernels.ops.kronecker_expand.reference import kronecker_expand as reference

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
CXX = shutil.which("g++")

# A tile is 64 or 128 wide, a stage 32 or 16 (float32) deep; the GPU has 2 multiprocessors.
SHAPES = {  # L1, L2 (None: no depth), m, n, M, N
    "odd everything": (3, 5, 5, 7, 11, 13),
    "no mix of layers": (4, None, 6, 5, 8, 9),
    "narrower, in several groups": (2, 3, 9, 8, 4, 5),
    "fewer layers": (5, 2, 4, 4, 6, 6),
    "groups of layers where the output will be": (4, 24, 8, 8, 16, 16),
    "the read map first": (2, 3, 8, 40, 16, 48),
    "a depth of many stages": (2, 3, 200, 24, 24, 24),
    "edges of both tiles, blocks of rows": (2, 3, 72, 72, 136, 72),
}
# What the emulated GPU does wrong, in the order of cuda_on_cpu.h.
MISTAKES = "none", "copies left", "products left", "not shown", "not fenced", "swizzle", "leading", "stride"
SHARED = {
    "shared maps": (True, True),
    "own maps": (False, False),
    "shared write": (True, False),
    "shared read": (False, True),
}
# dtype, torch's precision of float32 products, and what is multiplied. tf32 has as many bits as float16.
KINDS = {
    "float32": (torch.float32, "highest", None),
    "tf32": (torch.float32, "high", torch.float16),
    "bfloat16": (torch.bfloat16, "highest", None),
    "float16": (torch.float16, "highest", None),
}


def on_cpu(library: Path, *flags: str) -> Path:
    """The CUDA source, and the ops around it for CPU tensors, compiled as C++."""
    source = ROOT / "tests/csrc/kronecker_expand_on_cpu.cpp"
    command = f"{CXX} -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -Wall".split()
    command += ["-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000", *flags]
    command += ["-isystem", TORCH / "include", source, "-o", library]
    command += [f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return library


def why_not() -> str | None:
    """Why there is no emulation here, or None."""
    if sys.platform != "linux" or not CXX:
        return "needs Linux and g++"
    return extension.WHY_NOT


emulated = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The ops of the CUDA backend, for CPU tensors."""
    torch.ops.load_library(
        on_cpu(tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so", "-O3", "-march=native")
    )
    library = torch.ops.lcikernels_cuda_on_cpu
    library.set_gpu(True, MISTAKES.index("none"))  # which multiplies by warp groups where sizes allow
    return library


@pytest.fixture
def expand(library, monkeypatch):
    table = TABLES["kronecker_expand"]
    monkeypatch.setitem(table, "cuda", Backend(table["cuda"].module, anywhere))
    for part in ("kronecker_expand_forward", "kronecker_expand_backward"):
        monkeypatch.setattr(torch.ops.lcikernels_cpp, part, getattr(library, part))

    def run(**arguments):
        return kronecker_expand(**arguments, backend="cuda")

    return run


@pytest.fixture
def precision():
    """Sets how torch multiplies float32."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def inputs(L1, L2, m, n, M, N, shared, dtype):
    def leaf(*shape):
        return (torch.randn(*shape) / 4).to(dtype).requires_grad_()  # /4: float16 ends at 65504

    lead = [() if one else (L1,) for one in shared]
    whole = {"weight": leaf(L1, m, n), "write": leaf(*lead[0], M, m), "read": leaf(*lead[1], N, n)}
    return whole if L2 is None else whole | {"depth": leaf(L2, L1)}


@emulated
@pytest.mark.covering("pairs")
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(
    expand, precision, kind, shape, shared, poisoned
):
    dtype, of_float32, products = kind
    precision(of_float32)
    assert_agrees(expand, reference, products, **inputs(*shape, shared, dtype))


@emulated
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_one_number(expand, kind, poisoned):
    assert_agrees(expand, reference, **inputs(1, 1, 1, 1, 1, 1, (True, True), KINDS[kind][0]))


ADDED = {  # L1, L2, m, n, M - m, N - n
    "odd everything": (3, 5, 5, 7, 3, 9),
    "one new layer": (4, 1, 24, 40, 8, 16),
    "no mix of layers": (4, None, 8, 8, 5, 8),
    "the write map first": (2, 3, 40, 8, 32, 8),
    "no rows added": (2, 3, 8, 5, 0, 6),
    "no columns added": (2, None, 5, 8, 7, 0),
    "nothing added": (2, 3, 8, 8, 0, 0),
    "more than a vector, aligned by half": (2, 2, 12, 20, 12, 4),
    "groups of layers in the backward": (3, 6, 16, 16, 1, 1),
    "edges of both tiles": (2, 3, 72, 72, 136, 72),
}


@emulated
@pytest.mark.covering(2)
@pytest.mark.parametrize("shape", ADDED.values(), ids=ADDED)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_where_units_are_added_too(expand, precision, kind, shape, poisoned):
    dtype, of_float32, products = kind
    precision(of_float32)
    added = partial(expand, added=True), partial(reference, added=True)
    arguments = inputs(*shape, (True, True), dtype)
    assert_agrees(*added, products, **{name: x if x.numel() else x.detach() for name, x in arguments.items()})
    got = torch.autograd.grad(expand(**arguments, added=True).sum(), list(arguments.values()))
    assert [x.shape for x in got] == [x.shape for x in arguments.values()]


@emulated
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_added_units_leave_copied_old_ones_as_they_are_to_the_bit(expand, precision, kind):
    precision(kind[1])
    copied = inputs(4, None, 9, 7, 3, 5, (True, True), kind[0])
    assert torch.equal(expand(**copied, added=True)[:, :9, :7], copied["weight"])


@emulated
def test_two_runs_give_the_same_bits_and_strided_inputs_too(expand):
    whole = inputs(3, 4, 40, 24, 70, 72, (True, False), torch.bfloat16)
    strided = {name: x.detach().mT.contiguous().mT.requires_grad_() for name, x in whole.items()}
    assert not strided["weight"].is_contiguous()
    runs = []
    for arguments in whole, whole, strided:
        out = expand(**arguments)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), list(arguments.values()))])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))


# Rows begin at 16 bytes, tiles are 128 x 128 and 128 x 256, stages 64 deep, 3 or 4 of them.
LARGE = {  # L1, L2, m, n, M, N, units are added
    "edges of both widths": (1, 2, 8, 136, 136, 392, False),
    "more stages than slots": (1, 2, 328, 72, 72, 136, False),
    "added units": (2, 2, 136, 72, 72, 264, True),
    "layers of one map": (3, None, 72, 136, 80, 136, False),
}


@emulated
@pytest.mark.covering("pairs")
@pytest.mark.parametrize("warp_groups", [False, True])
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_large_tiles_by_warps_and_by_warp_groups(library, expand, kind, sizes, warp_groups, poisoned):
    *sizes, added = sizes
    arguments = inputs(*sizes, SHARED["shared maps"], KINDS[kind][0])
    library.set_gpu(warp_groups, MISTAKES.index("none"))
    try:
        assert_agrees(partial(expand, added=added), partial(reference, added=added), **arguments)
    finally:
        library.set_gpu(True, MISTAKES.index("none"))


REFUSED = {"products left": "cp.async to what products read", "not fenced": "no fence came before"}


@emulated
@pytest.mark.parametrize("mistake", MISTAKES[1:])
def test_the_emulated_gpu_shows_each_mistake_of_a_warp_group(library, mistake):
    tensors = [x.detach() for x in inputs(1, 2, 328, 136, 72, 136, (True, True), torch.bfloat16).values()]
    want = library.kronecker_expand_forward(*tensors, False, False)
    library.set_gpu(True, MISTAKES.index(mistake))
    try:
        assert not torch.equal(library.kronecker_expand_forward(*tensors, False, False), want)
        assert mistake not in REFUSED
    except RuntimeError as refusal:
        assert REFUSED.get(mistake, "CUDA refused a kernel") in str(refusal)
    finally:
        library.set_gpu(True, MISTAKES.index("none"))


def peak(run):
    """The most bytes that live at once while it runs, and what it returns."""
    with torch.profiler.profile(profile_memory=True) as profile:
        out = run()
    live, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most, out


@emulated
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shared, sizes", [("shared maps", (6, 12, 64, 64, 96, 96)), ("own maps", (3, 6, 32, 32, 512, 64))]
)
def test_memory_is_at_most_a_tenth_more_than_the_output(library, kind, shared, sizes):
    """That of the backward besides the gradients is at most 1.1 of the output's."""
    ops = library
    tensors = [x.detach() for x in inputs(*sizes, SHARED[shared], KINDS[kind][0]).values()]
    most, out = peak(lambda: ops.kronecker_expand_forward(*tensors, False, False))
    assert out.nbytes < most <= 1.1 * out.nbytes
    most, gradients = peak(lambda: ops.kronecker_expand_backward(out, *tensors, False, False, True))
    assert most - sum(x.nbytes for x in gradients) <= 1.1 * out.nbytes


@emulated
@pytest.mark.parametrize("L2", [1, 7, None])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_memory_is_the_output_alone_where_units_are_added(library, kind, L2):
    """That of the backward besides the gradients is at most 1.1 of the output's, for one new layer too."""
    ops = library
    tensors = inputs(12, L2, 96, 96, 32, 32, SHARED["shared maps"], KINDS[kind][0]).values()
    weight, write, read, depth = [x.detach() for x in tensors] + [None] * (L2 is None)
    most, out = peak(lambda: ops.kronecker_expand_forward(weight, write, read, depth, True, False))
    assert most == out.nbytes
    arguments = out, weight, write, read, depth, True, False, True
    most, gradients = peak(lambda: ops.kronecker_expand_backward(*arguments))
    assert most - sum(x.nbytes for x in gradients) <= 1.1 * out.nbytes


@emulated
def test_nothing_is_made_for_a_gradient_of_the_weight_that_nobody_asks_for(expand):
    for shared in SHARED.values():
        whole = inputs(2, 3, 8, 8, 16, 16, shared, torch.float32)
        leaves = [x for name, x in whole.items() if name != "weight"]
        want = torch.autograd.grad(expand(**whole).sum(), leaves)
        whole["weight"] = whole["weight"].detach()
        assert all(map(torch.equal, want, torch.autograd.grad(expand(**whole).sum(), leaves)))


@emulated
def test_it_passes_opcheck(expand):
    for shared in SHARED.values():
        whole = inputs(2, 3, 8, 8, 16, 16, shared, torch.float32)
        for added in (False, True)[: 1 + all(shared)]:
            arguments = *whole.values(), added, "cuda"
            torch.library.opcheck(torch.ops.lcikernels.kronecker_expand, arguments)


MISFITS = {
    "write must be [M, m] with m=4, got 5 on axis 1 of shape (6, 5)": {"write": torch.zeros(6, 5)},
    "read must be [L1, N, n] with L1=2, got 3 on axis 0 of shape (3, 6, 4)": {"read": torch.zeros(3, 6, 4)},
    "depth must be [L2, L1] with L1=2, got 3 on axis 1 of shape (3, 3)": {"depth": torch.zeros(3, 3)},
    "weight must be [L1, m, n], got shape (4, 4)": {"weight": torch.zeros(4, 4)},
    "weight must be Float, BFloat16 or Half, got Double": {"weight": torch.zeros(2, 4, 4).double()},
    "read must be Float, got Half": {"read": torch.zeros(6, 4).half()},
    "write must be contiguous, got strides (1, 6)": {"write": torch.zeros(4, 6).mT},
    "write must be [M-m, m], got shape (2, 6, 4)": {"write": torch.zeros(2, 6, 4), "added": True},
    "read must be [N-n, n] with n=4, got 5 on axis 1 of shape (6, 5)": {
        "read": torch.zeros(6, 5),
        "added": True,
    },
    "weight must be [L1, m, n] with L1 at least 1, got 0 on axis 0": {"weight": torch.zeros(0, 4, 4)},
}


@emulated
@pytest.mark.parametrize("sentence", MISFITS)
def test_the_library_refuses_what_does_not_fit(library, sentence):
    zeros = torch.zeros
    good = dict(weight=zeros(2, 4, 4), write=zeros(6, 4), read=zeros(6, 4))
    good |= dict(depth=zeros(3, 2), added=False, tf32=False)
    with pytest.raises(RuntimeError) as refusal:
        library.kronecker_expand_forward(**good | MISFITS[sentence])
    assert f"kronecker_expand: {sentence}" in str(refusal.value)


# Sizes whose rows begin at multiples of 16 bytes, and whose do not; tiles and stages that end in both.
OUT_OF_BOUNDS = """
import torch, lcikernels, sys
torch.ops.load_library(sys.argv[1])
ops = torch.ops.lcikernels_cuda_on_cpu
ops.set_gpu(True, 0)
small = (3, 4, 5, 7, 11, 67), (2, 3, 24, 8, 72, 40)
for dtype, tf32 in (torch.float32, True), (torch.float32, False), (torch.bfloat16, False):
    for L1, L2, m, n, M, N in (*small, (2, 2, 8, 72, 72, 136)) if dtype is torch.bfloat16 else small:
        for own, added in ((), False), ((L1,), False), ((), True):
            sizes = (L1, m, n), (*own, M, m), (*own, N, n), (L2, L1)
            tensors = [torch.randn(size).to(dtype) for size in sizes]
            out = ops.kronecker_expand_forward(*tensors, added, tf32)
            ops.kronecker_expand_backward(torch.ones_like(out), *tensors, added, tf32, True)
print("in bounds")
"""


@emulated
@pytest.mark.everything
def test_nothing_is_read_or_written_outside_of_tensors(tmp_path):
    """Under the address sanitizer, which knows where each allocation of torch's ends."""
    runtime = subprocess.check_output([CXX, "-print-file-name=libasan.so"], text=True).strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no address sanitizer")
    sanitized = on_cpu(tmp_path / "sanitized.so", "-O1", "-fsanitize=address")
    env = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-W", "ignore", "-c", OUT_OF_BOUNDS, sanitized]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "in bounds\n", done.stderr[-4000:]
