"""fla's gated norms, argument by argument, against the norm written out."""

import inspect
from collections.abc import Callable

import pytest
import torch
from tolerance import assert_agrees
from torch import Tensor

from lcikernels.compat import fla

FUNCTIONS = (fla.rms_norm_gated, fla.layer_norm_gated)
B, T, D = 2, 7, 37


def written_out(function: Callable) -> Callable:
    """The function's equation, in the dtype of the inputs."""

    def norm(
        x: Tensor,
        g: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: str = "swish",
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        eps: float = 1e-6,
    ) -> Tensor | tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        centred = total - total.mean(-1, keepdim=True) if function is fla.layer_norm_gated else total
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        y = y * g.sigmoid() * (1 if activation == "sigmoid" else g)
        return (y, total) if prenorm else y

    return norm


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "x": leaf(B, T, D, dtype=dtype),
        "g": leaf(B, T, D, dtype=dtype),
        "weight": leaf(D),
        "bias": leaf(D),
    }


ARGUMENTS = {
    "x, g, weight, bias": dict,
    "no bias": lambda: {"bias": None},
    "no weight": lambda: {"weight": None},
    "neither": lambda: {"weight": None, "bias": None},
    "silu": lambda: {"activation": "silu"},
    "sigmoid": lambda: {"activation": "sigmoid"},
    "eps": lambda: {"eps": 0.3},
    "residual": lambda: {"residual": leaf(B, T, D)},
    "residual, prenorm": lambda: {"residual": leaf(B, T, D), "prenorm": True},
    "prenorm alone": lambda: {"prenorm": True},
    "a vector": lambda: {"x": leaf(D), "g": leaf(D)},
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_arguments_are_the_published_ones_in_their_order(function):
    published = "x g weight bias activation residual prenorm residual_in_fp32 eps"
    parameters = inspect.signature(function).parameters
    assert list(parameters) == published.split()
    assert [x.default for x in parameters.values()][4:] == ["swish", None, False, False, 1e-6]


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_outputs_and_gradients_are_as_exact_as_the_norm_written_out(function, arguments, poisoned):
    assert_agrees(function, written_out(function), **inputs() | arguments())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_sum_with_a_16_bit_residual_is_not_rounded_before_it_is_normed(function, dtype):
    whole = inputs(dtype) | {"residual": leaf(B, T, D, dtype=dtype)}
    assert_agrees(function, written_out(function), **whole)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_output_has_the_dtype_of_x_where_tensors_have_several(function):
    whole = inputs() | {
        "x": leaf(B, T, D, dtype=torch.bfloat16),
        "weight": leaf(D, dtype=torch.float16),
        "residual": leaf(B, T, D),
        "prenorm": True,
    }
    assert_agrees(function, written_out(function), **whole)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_sum_has_the_dtype_of_the_residual_or_float32_where_that_is_asked_for(function):
    whole = inputs(torch.bfloat16) | {"prenorm": True}
    x, residual = whole["x"], leaf(B, T, D, dtype=torch.float16)
    assert function(**whole)[1] is x
    as_float32 = function(**whole, residual_in_fp32=True)[1]
    assert as_float32.dtype == torch.float32 and torch.equal(as_float32, x.float())
    total = function(**whole, residual=residual, residual_in_fp32=True)[1]
    assert total.dtype == torch.float16 and torch.equal(total, (x.float() + residual.float()).half())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_norms_compile_into_one_graph_with_gradients(function):
    torch.compiler.reset()
    whole = inputs() | {"residual": leaf(B, T, D)}

    def loss(*values):
        y, total = function(**dict(zip(whole, values)), activation="sigmoid", prenorm=True)
        return y.square().sum() + total.sin().sum()

    leaves = tuple(whole.values())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(got, want)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 4, 5), dtype=dtype)


REFUSALS = {
    "another activation": (
        lambda: fla.rms_norm_gated(x(), x(), None, None, "gelu"),
        "rms_norm_gated: activation must be 'swish' or 'silu' or 'sigmoid', got 'gelu'",
    ),
    "no gate": (
        lambda: fla.layer_norm_gated(x(), None, None, None),
        "layer_norm_gated: g must be a torch.Tensor, got None",
    ),
    "a gate of other tokens": (
        lambda: fla.rms_norm_gated(x(), x(2, 3, 5), None, None),
        "rms_norm_gated: g must be [axis0, axis1, D] with axis1=4, got 3 on axis 1 of shape (2, 3, 5)",
    ),
    "a residual of other channels": (
        lambda: fla.layer_norm_gated(x(), x(), None, None, residual=x(2, 4, 6)),
        "layer_norm_gated: residual must be [axis0, axis1, D] with D=5, got 6 on axis 2 of shape (2, 4, 6)",
    ),
    "a bias of other channels": (
        lambda: fla.rms_norm_gated(x(), x(), x(5), x(4)),
        "rms_norm_gated: bias must be [D] with D=5, got 4 on axis 0 of shape (4,)",
    ),
    "integers": (
        lambda: fla.rms_norm_gated(x(), x(), x(5, dtype=torch.int32), None),
        "rms_norm_gated: weight must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
}


@pytest.mark.parametrize("call, message", REFUSALS.values(), ids=REFUSALS)
def test_a_call_that_does_not_fit_is_refused_by_function_and_argument(call, message):
    with pytest.raises(ValueError) as refusal:
        call()
    assert str(refusal.value) == message
