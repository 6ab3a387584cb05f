import pytest
import torch
from tolerance import assert_agrees

from lcikernels import gated_rms_norm
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as reference


def inputs(*shape, dtype=torch.float32):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "gate": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "weight": torch.randn(shape[-1], dtype=exact, requires_grad=True),
    }


@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 5, 3, 64)], ids=["a vector", "width one", "heads"])
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(shape, poisoned):
    assert_agrees(gated_rms_norm, reference, **inputs(*shape))


@pytest.mark.parametrize("missing", ["gate", "weight"])
def test_what_is_optional_can_be_left_out(missing, poisoned):
    assert_agrees(gated_rms_norm, reference, **inputs(4, 33) | {missing: None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    assert_agrees(gated_rms_norm, reference, **inputs(4, 33, dtype=dtype))


def test_eps_keeps_a_row_of_zeros_finite():
    zeros = inputs(2, 8)
    zeros["x"] = torch.zeros(2, 8, requires_grad=True)
    assert_agrees(gated_rms_norm, reference, **zeros, eps=1e-3)


def test_gradcheck():
    leaves = tuple(inputs(2, 3, 5, dtype=torch.float64).values())
    assert torch.autograd.gradcheck(lambda *values: gated_rms_norm(*values), leaves)
