from functools import partial
from itertools import product

import pytest
import torch
from devices import on_device, why_not
from tolerance import assert_agrees, largest, max_error, outputs_and_grads

from lcikernels import gated_rms_norm
from lcikernels.backends import TABLES
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as reference


def inputs(*shape, dtype=torch.float32):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "gate": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "weight": torch.randn(shape[-1], dtype=exact, requires_grad=True),
        "bias": torch.randn(shape[-1], dtype=exact, requires_grad=True),
    }


# What changes the formula: the gate's place and curve, what a norm is, how many there are in a row.
GATES = [
    {"norm_before_gate": after, "activation": activation}
    for after, activation in product((True, False), ("silu", "sigmoid"))
]
FORMULAS = [
    gate | {"kind": kind, "groups": groups} for gate, kind, groups in product(GATES, ("rms", "layer"), (1, 3))
]
MISSING = [names for names in product(*((name, None) for name in ("gate", "weight", "bias"))) if any(names)]


def formula_id(options):
    place = "after" if options["norm_before_gate"] else "first"
    return f"{options['activation']} {place}, {options['groups']} {options['kind']}"


def without(arguments, names):
    return arguments | {name: None for name in names if name}


@pytest.fixture(params=TABLES["gated_rms_norm"])
def norm(request):
    """The op on each backend."""
    if why := why_not("gated_rms_norm", request.param):
        pytest.skip(why)
    return on_device(gated_rms_norm, request.param)


@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 5, 3, 64)], ids=["a vector", "width one", "heads"])
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(norm, shape, poisoned):
    assert_agrees(norm, reference, **inputs(*shape))


@pytest.mark.parametrize("formula", FORMULAS, ids=formula_id)
def test_every_formula_is_as_exact_as_the_reference(norm, formula, poisoned):
    assert_agrees(norm, reference, **inputs(4, 33), **formula)


@pytest.mark.parametrize("missing", MISSING, ids=lambda names: ", ".join(filter(None, names)))
@pytest.mark.parametrize("formula", [FORMULAS[1], FORMULAS[11]], ids=formula_id)
def test_what_is_optional_can_be_left_out(norm, missing, formula, poisoned):
    assert_agrees(norm, reference, **without(inputs(2, 33), missing), **formula)


@pytest.mark.parametrize("backend", TABLES["gated_rms_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formula", FORMULAS[::3], ids=formula_id)
def test_16_bit_inputs_are_computed_in_float32(formula, dtype, backend):
    if why := why_not("gated_rms_norm", backend, dtype):
        pytest.skip(why)
    norm = on_device(gated_rms_norm, backend)
    assert_agrees(norm, reference, **inputs(4, 33, dtype=dtype), **formula)


@pytest.mark.parametrize("after", [True, False])
def test_a_layer_norm_of_a_row_far_from_zero_loses_no_more_than_its_inputs(norm, after):
    """The variance of 100 and what is around it: sums of squares would leave 3 digits of 7."""
    arguments = {name: x.detach() for name, x in inputs(4, 600).items()}
    arguments["x"] = 100 + arguments["x"]
    arguments["gate"] = 3 + arguments["gate"] / 100
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}
    assert_agrees(norm, reference, **leaves, kind="layer", norm_before_gate=after)


@pytest.mark.parametrize("kind, channels", [("rms", 1), ("layer", 2)])
def test_a_group_of_one_number_has_the_gradient_that_eps_leaves_it(norm, kind, channels):
    """eps / rms³ of what comes, 1e-9 of each of the two terms whose difference it is."""
    arguments = inputs(4, 3 * channels) | {"kind": kind, "groups": 3, "norm_before_gate": False}
    arguments["x"] = (100 * arguments["x"].detach()).requires_grad_()
    got = outputs_and_grads(norm, arguments, lambda x: x, 0)
    truth = outputs_and_grads(reference, arguments, torch.Tensor.double, 0)
    for what in ("gradient of x", "gradient of gate"):
        assert max_error(got[what], truth[what]) <= 1e-5 * largest(truth[what]), what


def test_eps_keeps_a_row_of_zeros_finite(norm):
    zeros = inputs(2, 8)
    zeros["x"] = torch.zeros(2, 8, requires_grad=True)
    assert_agrees(norm, reference, **zeros, eps=1e-3)
    assert_agrees(norm, reference, **zeros, eps=1e-3, kind="layer", norm_before_gate=False)


@pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value)"
)  # of NumPy: Triton's rows beyond the last
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_without_eps_only_rows_of_zeros_are_undefined(norm, kind):
    assert_agrees(norm, reference, **inputs(3, 34), eps=0.0, kind=kind, groups=2)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of NumPy, for Triton's interpreter
@pytest.mark.parametrize("activation, place", [("silu", True), ("silu", False), ("sigmoid", False)])
def test_gates_beyond_what_an_exponential_holds(norm, activation, place):
    arguments = {name: x.detach() for name, x in inputs(3, 8).items()}
    arguments["gate"] = torch.linspace(-200, 200, 24).view(3, 8)
    leaves = {name: x.requires_grad_() for name, x in arguments.items()}
    assert_agrees(norm, reference, **leaves, activation=activation, norm_before_gate=place)


@pytest.mark.parametrize("backend", TABLES["gated_rms_norm"])
@pytest.mark.parametrize("formula", FORMULAS, ids=formula_id)
def test_gradcheck(formula, backend):
    if why := why_not("gated_rms_norm", backend, torch.float64):
        pytest.skip(why)
    leaves = tuple(inputs(2, 6, dtype=torch.float64).values())
    norm = partial(gated_rms_norm, **formula, backend=backend)
    assert torch.autograd.gradcheck(norm, leaves)


def test_the_norms_of_torch_and_of_mamba_2_are_special_cases():
    x, gate, weight, bias = (x.detach() for x in inputs(4, 34, dtype=torch.float64).values())
    layer = torch.nn.functional.layer_norm(x, (34,), weight, bias, 1e-5)
    torch.testing.assert_close(gated_rms_norm(x, None, weight, bias, kind="layer"), layer)
    halves = torch.nn.functional.group_norm(x, 2, weight, bias, 1e-5)
    torch.testing.assert_close(gated_rms_norm(x, None, weight, bias, kind="layer", groups=2), halves)
    gated = x * torch.nn.functional.silu(gate)
    parts = [torch.nn.functional.rms_norm(part, (17,), None, 1e-5) for part in gated.chunk(2, -1)]
    got = gated_rms_norm(x, gate, weight, groups=2, norm_before_gate=False)
    torch.testing.assert_close(got, torch.cat(parts, -1) * weight)
