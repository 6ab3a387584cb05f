"""The compiled norm on every instruction set: what the shapes of tests/ops do not reach."""

import pytest
import torch
from ops.test_gated_rms_norm import FORMULAS, formula_id
from tolerance import assert_agrees
from torch import Tensor

from lcikernels import extension, gated_rms_norm
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as reference

# A task is 32 rows or 32768 elements.
SHAPES = {
    "one element": (1, 1),
    "a row shorter than a vector": (5, 3),
    "a vector and one": (9, 17),
    "33 wide": (40, 33),
    "several tasks": (1100, 64),
    "heads": (2, 5, 3, 256),
    "wide, several tasks": (33, 4096),
    "wider than the first cache": (2, 20001),
}


def inputs(*shape, dtype=torch.float32, exact=None):
    exact = exact or torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "gate": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "weight": torch.randn(shape[-1], dtype=exact, requires_grad=True),
        "bias": torch.randn(shape[-1], dtype=exact, requires_grad=True),
    }


def compiled(**arguments):
    return gated_rms_norm(**arguments, backend="cpp")


def run(arguments):
    """The output, and the gradients from a random cotangent."""
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    y = compiled(**arguments)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_width_is_as_exact_as_the_reference(instruction_set, shape, poisoned):
    assert_agrees(compiled, reference, **inputs(*shape))


@pytest.mark.parametrize("formula", FORMULAS, ids=formula_id)
def test_every_formula_is_as_exact_as_the_reference(instruction_set, formula, poisoned):
    """A group is a vector and one."""
    assert_agrees(compiled, reference, **inputs(40, 51), **formula)


@pytest.mark.parametrize("formula", FORMULAS[3::4], ids=formula_id)
def test_groups_of_whole_vectors_in_several_tasks(instruction_set, formula, poisoned):
    assert_agrees(compiled, reference, **inputs(180, 192), **formula)


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("missing", [("gate",), ("weight",), ("bias",), ("gate", "weight", "bias")], ids=str)
@pytest.mark.parametrize("formula", FORMULAS[1::2], ids=formula_id)
def test_what_is_optional_can_be_left_out(instruction_set, formula, missing, poisoned):
    assert_agrees(compiled, reference, **inputs(40, 33) | dict.fromkeys(missing), **formula)


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formula", FORMULAS, ids=formula_id)
def test_bfloat16_is_computed_and_summed_in_float32(instruction_set, formula, parameters, poisoned):
    arguments = inputs(80, 66, dtype=torch.bfloat16, exact=parameters)
    assert_agrees(compiled, reference, **arguments, **formula)


@pytest.mark.parametrize("formula", [FORMULAS[0], FORMULAS[-1]], ids=formula_id)
def test_sums_over_many_rows_stay_exact(instruction_set, formula):
    assert_agrees(compiled, reference, **inputs(20000, 6), **formula)


@pytest.mark.parametrize("formula", FORMULAS, ids=formula_id)
def test_float64_is_exact_to_float64(instruction_set, formula):
    arguments = inputs(40, 36, dtype=torch.float64)
    got, want = (
        torch.autograd.grad(op(**arguments, **formula).square().sum(), list(arguments.values()))
        for op in (compiled, reference)
    )
    for x, y in zip(got, want):
        assert (x - y).abs().max() <= 1e-13 * y.abs().max()


@pytest.mark.parametrize("after", [True, False])
def test_rows_of_a_wider_tensor_need_no_copy(instruction_set, after, monkeypatch):
    """And have the same bits as a copy; so do rows that have to be copied."""
    wide = torch.randn(3, 50, 2 * 38)
    x, gate = (part.detach().requires_grad_() for part in wide.chunk(2, -1))
    others = {"weight": torch.randn(38, requires_grad=True), "groups": 2, "norm_before_gate": after}
    copies = {"x": x.detach().clone().requires_grad_(), "gate": gate.detach().clone().requires_grad_()}
    want = run(copies | others)
    scattered = {name: u.detach().mT.contiguous().mT.requires_grad_() for name, u in copies.items()}
    assert all(torch.equal(a, b) for a, b in zip(run(scattered | others), want))
    monkeypatch.setattr(Tensor, "contiguous", lambda u: u if u.is_contiguous() else pytest.fail("a copy"))
    assert all(torch.equal(a, b) for a, b in zip(run({"x": x, "gate": gate} | others), want))


@pytest.mark.parametrize("formula", FORMULAS[::7], ids=formula_id)
def test_what_goes_past_the_caches_has_the_same_bits(instruction_set, formula, past_caches):
    """Of the backward pass the first third of the rows fits; they are of no whole number of cache lines."""
    D = 1539
    rows = 4 * past_caches // (4 * 3 * D) + 1
    arguments = inputs(rows, D)
    y, dx, dgate, *_ = run(arguments | formula)
    part = slice(0, rows // 6)
    some = {name: u.detach()[part].requires_grad_() for name, u in arguments.items() if u.dim() == 2}
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))[part]
    alone = compiled(**arguments | some | formula)
    gradients = torch.autograd.grad(alone, list(some.values()), cotangent)
    assert all(torch.equal(a[part], b) for a, b in zip((y, dx, dgate), (alone, *gradients)))


@pytest.mark.parametrize("formula", FORMULAS[::5], ids=formula_id)
def test_the_number_of_threads_changes_no_bit(instruction_set, formula):
    arguments = inputs(1500, 69) | formula
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(arguments))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others))


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("where", ["x", "gate"])
@pytest.mark.parametrize("formula", FORMULAS, ids=formula_id)
def test_a_nan_stays_in_its_group(instruction_set, formula, where):
    clean = inputs(50, 57)
    dirty = {name: x.detach().clone() for name, x in clean.items()}
    dirty[where][7, 37] = torch.nan
    dirty = {name: x.requires_grad_() for name, x in dirty.items()}
    got, want = run(dirty | formula), run(clean | formula)
    others = torch.ones(50, 57, dtype=torch.bool)
    others[7, slice(19, 38) if formula["groups"] == 3 else slice(None)] = False
    assert got[0][7, 37].isnan()
    for x, y in zip(got[:3], want[:3]):
        assert torch.equal(x[others], y[others])
    for x, y in zip(got[3:], want[3:]):
        assert torch.equal(x[others[7]], y[others[7]])


@pytest.mark.skipif(extension.WHY_NOT is not None, reason=str(extension.WHY_NOT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_empty_gradients_have_the_dtypes_that_a_graph_expects(kind, dtype):
    x = torch.randn(5, 17, dtype=dtype)
    backward = torch.ops.lcikernels.gated_rms_norm_backward
    torch.library.opcheck(
        backward,
        (x, x, None, None, None, 1e-5, 1, True, "silu", kind, "cpp"),
        test_utils=("test_faketensor",),
    )
