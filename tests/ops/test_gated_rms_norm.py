import pytest
import torch
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
    if why := TABLES["gated_rms_norm"][request.param].why_not(torch.empty(1)):
        pytest.skip(why)

    def on_backend(*tensors, **arguments):
        return gated_rms_norm(*tensors, **arguments, backend=request.param)

    return on_backend


@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 5, 3, 64)], ids=["a vector", "width one", "heads"])
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(norm, shape, poisoned):
    assert_agrees(norm, reference, **inputs(*shape))


@pytest.mark.parametrize("missing", ["gate", "weight"])
def test_what_is_optional_can_be_left_out(norm, missing, poisoned):
    assert_agrees(norm, reference, **inputs(4, 33) | {missing: None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    assert_agrees(gated_rms_norm, reference, **inputs(4, 33, dtype=dtype))


def test_eps_keeps_a_row_of_zeros_finite(norm):
    zeros = inputs(2, 8)
    zeros["x"] = torch.zeros(2, 8, requires_grad=True)
    assert_agrees(norm, reference, **zeros, eps=1e-3)


def test_gradcheck(norm):
    leaves = tuple(inputs(2, 3, 5, dtype=torch.float64).values())
    assert torch.autograd.gradcheck(lambda *values: norm(*values), leaves)
