"""LiGO's expansion by csrc/cpu on every instruction set that this machine has."""

from functools import partial

import pytest
import torch
from tolerance import assert_agrees

from lcikernels import extension, kronecker_expand
from lcikernels.ops.kronecker_expand.reference import kronecker_expand as reference

pytestmark = pytest.mark.skipif(extension.WHY_NOT is not None, reason=str(extension.WHY_NOT))
expand = partial(kronecker_expand, backend="cpp")

# A panel is up to 32 columns wide, a block 256, a run of a sum 192 long.
# L1, L2 (None: no depth), m, n, and of write and read the rows
SHAPES = {
    "layers mixed first": (5, 2, 40, 33, 50, 60),
    "layers mixed first, read first": (5, 2, 33, 40, 60, 50),
    "layers widened first": (2, 9, 33, 40, 50, 35),
    "layers widened first, read first": (2, 9, 40, 33, 35, 50),
    "no mix of layers": (3, None, 17, 40, 33, 20),
    "more than a block and a run": (2, 5, 200, 20, 270, 7),
    "more than a block and a run, read first": (2, 1, 20, 200, 7, 270),
    "as many layers as two panels": (3, 40, 5, 6, 4, 7),
}


def inputs(L1, L2, m, n, rows, columns, own=(), dtype=torch.float32):
    sizes = {"weight": (L1, m, n), "write": (*own, rows, m), "read": (*own, columns, n), "depth": (L2, L1)}
    leaves = {name: torch.randn(size) for name, size in sizes.items() if None not in size}
    return {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_order_of_products_is_as_exact_as_the_reference(instruction_set, shape, poisoned):
    agrees(shape, torch.float32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_is_too_by_the_best_instructions(shape, poisoned):
    agrees(shape, torch.bfloat16)


def agrees(shape, dtype):
    added = partial(expand, added=True), partial(reference, added=True)
    assert_agrees(*added, **inputs(*shape, dtype=dtype))
    assert_agrees(expand, reference, **inputs(*shape, dtype=dtype))
    assert_agrees(expand, reference, **inputs(*shape, own=shape[:1], dtype=dtype))


# float64: half the numbers fill the memory that is used at once
PARTS = {"of layers": (4, 24, 256, 250, 20, 30), "of rows": (8, 17, 260, 256, 400, 40)}


def results(op, arguments, added):
    out = op(**arguments, added=added)
    return out, *torch.autograd.grad(out.square().sum(), list(arguments.values()))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_computed_in_parts_is_the_same(part, added, poisoned):
    arguments = inputs(*PARTS[part], dtype=torch.float64)
    want = results(partial(kronecker_expand, backend="torch"), arguments, added)
    for x, y in zip(results(expand, arguments, added), want):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * y.abs().max().item())


@pytest.mark.parametrize("shape", [(5, 2, 200, 220, 90, 130), (3, 9, 100, 90, 300, 270)], ids=str)
def test_the_number_of_threads_changes_no_bit(instruction_set, shape):
    arguments, threads = inputs(*shape), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 64):
            torch.set_num_threads(count)
            runs.append(results(expand, arguments, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_copied_layers_are_copied_to_the_bit(dtype):
    arguments = inputs(4, None, 9, 7, 3, 5, dtype=dtype)
    assert torch.equal(expand(**arguments, added=True)[:, :9, :7], arguments["weight"])


@pytest.mark.parametrize("rows, columns", [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("L2", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_none_of_the_units_need_be_new(dtype, L2, rows, columns, poisoned):
    arguments = inputs(4, L2, 9, 7, rows, columns, dtype=dtype)
    arguments = {name: x if x.numel() else x.detach() for name, x in arguments.items()}
    assert_agrees(partial(expand, added=True), partial(reference, added=True), **arguments)
