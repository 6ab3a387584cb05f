import pytest
import torch
from devices import on_device, why_not
from tolerance import assert_agrees

from lcikernels import gated_rms_norm
from lcikernels.backends import TABLES
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as reference


def inputs(*shape, dtype=torch.float32):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "gate": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "weight": torch.randn(shape[-1], dtype=exact, requires_grad=True),
    }


@pytest.fixture(params=TABLES["gated_rms_norm"])
def norm(request):
    """The op on each backend."""
    if why := why_not("gated_rms_norm", request.param):
        pytest.skip(why)
    return on_device(gated_rms_norm, request.param)


@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 5, 3, 64)], ids=["a vector", "width one", "heads"])
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(norm, shape, poisoned):
    assert_agrees(norm, reference, **inputs(*shape))


@pytest.mark.parametrize("missing", ["gate", "weight"])
def test_what_is_optional_can_be_left_out(norm, missing, poisoned):
    assert_agrees(norm, reference, **inputs(4, 33) | {missing: None})


@pytest.mark.parametrize("backend", TABLES["gated_rms_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_computed_in_float32(dtype, backend):
    if why := why_not("gated_rms_norm", backend, dtype):
        pytest.skip(why)
    assert_agrees(on_device(gated_rms_norm, backend), reference, **inputs(4, 33, dtype=dtype))


def test_eps_keeps_a_row_of_zeros_finite(norm):
    zeros = inputs(2, 8)
    zeros["x"] = torch.zeros(2, 8, requires_grad=True)
    assert_agrees(norm, reference, **zeros, eps=1e-3)


@pytest.mark.parametrize("backend", TABLES["gated_rms_norm"])
def test_gradcheck(backend):
    if why := why_not("gated_rms_norm", backend, torch.float64):
        pytest.skip(why)
    leaves = tuple(inputs(2, 3, 5, dtype=torch.float64).values())
    assert torch.autograd.gradcheck(lambda *values: gated_rms_norm(*values, backend=backend), leaves)
