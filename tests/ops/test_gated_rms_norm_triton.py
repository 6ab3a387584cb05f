"""The gated RMS norm in Triton: what the shapes of test_gated_rms_norm.py do not reach."""

import pytest
import torch
from devices import on_device, why_not
from ops.test_gated_rms_norm import FORMULAS, formula_id, inputs
from tolerance import assert_agrees

from lcikernels import gated_rms_norm
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as reference

if why := why_not("gated_rms_norm", "triton"):
    pytest.skip(why, allow_module_level=True)

from lcikernels.ops.gated_rms_norm import kernel

norm = on_device(gated_rms_norm, "triton")
GROUPED = [formula for formula in FORMULAS if formula["groups"] == 3]


@pytest.fixture
def small_tiles(monkeypatch):
    """Of 16 elements, in two programs."""
    monkeypatch.setattr(kernel, "MOST", 16)
    monkeypatch.setattr(kernel, "STRIPES", 2)


SHAPES = [(shape, None) for shape in ((11, 5), (7, 16), (5, 35), (3, 1, 33))]
SHAPES += [(shape, missing) for shape in ((11, 5), (5, 35)) for missing in ("gate", "weight", "bias")]


@pytest.mark.parametrize("shape, missing", SHAPES, ids=str)
def test_many_rows_and_rows_of_several_tiles(small_tiles, shape, missing, poisoned):
    arguments = inputs(*shape)
    assert_agrees(norm, reference, **arguments | ({} if missing is None else {missing: None}))


ROWS_OF_THREE = {"one tile": (5, 15), "several": (3, 51)}
CASES = [(formula, "one tile") for formula in GROUPED if formula["activation"] == "silu"]
CASES += [(formula, "several") for formula in GROUPED[::3]]


@pytest.mark.parametrize("formula, tiles", CASES, ids=lambda x: x if isinstance(x, str) else formula_id(x))
def test_groups_of_one_tile_and_of_several(small_tiles, monkeypatch, formula, tiles, poisoned):
    monkeypatch.setattr(kernel, "STRIPES", 4)  # two for each of 3 groups
    assert_agrees(norm, reference, **inputs(*ROWS_OF_THREE[tiles]), **formula)


def outputs_and_gradients(arguments):
    y = norm(**arguments)
    leaves = [x for x in arguments.values() if x.requires_grad]
    return [y, *torch.autograd.grad(y.sum(), leaves)]


@pytest.mark.parametrize("D", [5, 35])
def test_two_runs_and_rows_of_a_wider_tensor_give_the_same_bits(small_tiles, D):
    arguments = inputs(7, D)
    part = torch.randn(7, 3 * D).chunk(3, 1)[1]
    arguments["x"] = part.detach().requires_grad_()
    copied = arguments | {"x": part.clone(memory_format=torch.contiguous_format).requires_grad_()}
    first, second, third = map(outputs_and_gradients, (arguments, arguments, copied))
    for x, y, z in zip(first, second, third):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.parametrize("D", [5, 35])
@pytest.mark.parametrize("name", ["x", "gate"])
def test_a_nan_stays_in_its_row(small_tiles, name, D):
    clean = inputs(7, D)
    dirty = {key: x.detach().clone() for key, x in clean.items()}
    dirty[name][3, 2] = torch.nan
    dirty = {key: x.requires_grad_() for key, x in dirty.items()}
    (y, *grads), (want_y, *want) = outputs_and_gradients(dirty), outputs_and_gradients(clean)
    others = [0, 1, 2, 4, 5, 6]
    assert y[3].isnan().any()
    for x, z in zip((y, *grads[:2]), (want_y, *want[:2])):
        assert torch.equal(x[others], z[others])
