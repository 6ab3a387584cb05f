"""Every test starts from the same seed, on at most two threads, and memory that nobody wrote is NaN.

Without a GPU, Triton's kernels run in its interpreter. It is asked for before torch imports Triton. Nothing
is asked of the Hugging Face Hub.
"""

import gc
import os
from pathlib import Path

if not [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]:
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["HF_HUB_OFFLINE"] = "1"

import covering
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401  makes it fast

from lcikernels import extension


def pytest_addoption(parser):
    parser.addoption("--part", default="1of1", help="2of4: of every 4 tests the second")
    parser.addoption("--everything", action="store_true", help="what covering.py leaves out too")
    parser.addoption("--calls", type=int, default=0, help="of each op in test_fuzz.py; 0: a sample")
    parser.addoption("--kills", type=int, default=12, help="of runs, in tests/growth/test_bad_day.py")


def pytest_configure(config):
    for mark in covering.MARKS:
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--everything"):
        left_out = covering.left_out(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    part, parts = map(int, config.getoption("--part").split("of"))
    items[:] = items[part - 1 :: parts]


def pytest_collection_finish():
    """What is there stays to the end: no collection of garbage walks it again. Every transformers.Trainer
    asks for one, which took half of the time of tests that train."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else nanobind takes what is there for leaks


def pytest_terminal_summary(terminalreporter):
    """What tests tell of themselves besides that they passed."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {name} {value}")


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty gives NaN: what a backend leaves unwritten shows in its result."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def past_caches():
    """So many bytes and more go past the caches, as csrc/caches.h has it."""
    told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    known = int(told.read_text().strip().rstrip("K")) * 1024 if told.exists() else 0
    if known > 2**26:
        pytest.skip(f"caches of {known / 2**20:.0f} MB: tensors beyond them would take seconds")
    return known if known > 0 else 2**25


@pytest.fixture
def tensor_cores(monkeypatch):
    """Triton's interpreter multiplies as tensor cores do: bfloat16, which it gets wrong, and real tf32."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language as tl
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self, x, dtype):
        """To the nearest bfloat16; the interpreter cuts off."""
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        return TensorHandle(torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy(), dtype.scalar)

    def operand(x, precision) -> torch.Tensor:
        u = torch.from_numpy(x.data)
        if x.dtype.scalar == tl.bfloat16:
            return u.view(torch.bfloat16).float()
        if precision == INPUT_PRECISION.TF32:
            u = (u.view(torch.int32) & ~0x1FFF).view(torch.float32)  # the first 10 bits of 23
        return u

    def dot(self, x, y, acc, precision, _):
        product = operand(x, precision) @ operand(y, precision)
        return TensorHandle(acc.data + product.numpy(), acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=["base", "avx2", "avx512"])
def instruction_set(request):
    """Each build of the compiled kernels that this machine can run."""
    if extension.WHY_NOT:
        pytest.skip(extension.WHY_NOT)
    best = torch.ops.lcikernels_cpp.instruction_set()
    try:
        torch.ops.lcikernels_cpp.use_instruction_set(request.param)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    yield request.param
    torch.ops.lcikernels_cpp.use_instruction_set(best)


torch.set_num_threads(min(2, torch.get_num_threads()))
