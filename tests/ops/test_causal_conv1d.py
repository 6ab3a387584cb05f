import pytest
import torch
from devices import on_device, why_not
from shapes import CAUSAL_CONV1D, PACKED
from tolerance import assert_agrees

from lcikernels import causal_conv1d, causal_conv1d_step
from lcikernels.backends import TABLES
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as reference


def inputs(B, T, D, W, *, N=None, dtype=torch.float32):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(B, T, D, dtype=dtype, requires_grad=True),
        "weight": torch.randn(D, W, dtype=exact, requires_grad=True),
        "bias": torch.randn(D, dtype=exact, requires_grad=True),
        "initial_state": torch.randn(N or B, D, W - 1, dtype=exact, requires_grad=W > 1),
        "return_final_state": True,
    }


@pytest.fixture(params=TABLES["causal_conv1d"])
def conv(request):
    """The op on each backend."""
    if why := why_not("causal_conv1d", request.param):
        pytest.skip(why)

    def on_backend(x, **arguments):
        if why := why_not("causal_conv1d", request.param, x.dtype):
            pytest.skip(why)
        return on_device(causal_conv1d, request.param)(x, **arguments)

    return on_backend


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", CAUSAL_CONV1D.values(), ids=CAUSAL_CONV1D)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(conv, shape, activation, poisoned):
    whole = inputs(*shape)
    if shape[3] == 1:
        whole |= {"initial_state": None, "return_final_state": False}
    assert_agrees(conv, reference, **whole, activation=activation)


@pytest.mark.parametrize("missing", ["bias", "initial_state"])
def test_what_is_optional_can_be_left_out(conv, missing, poisoned):
    assert_agrees(conv, reference, **inputs(*CAUSAL_CONV1D["Mamba's"]) | {missing: None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    whole = inputs(*CAUSAL_CONV1D["Mamba's"], dtype=dtype)
    assert_agrees(causal_conv1d, reference, **whole, activation="silu")


@pytest.mark.parametrize("bounds", PACKED.values(), ids=PACKED)
def test_packed_sequences_do_not_see_each_other(conv, bounds, poisoned):
    packed = inputs(1, bounds[-1], 3, 4, N=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert_agrees(conv, reference, **packed, cu_seqlens=cu_seqlens, activation="silu")


def test_it_is_pytorchs_own_padded_convolution(conv):
    x, weight, bias = torch.randn(2, 10, 6), torch.randn(6, 4), torch.randn(6)
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    theirs = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6).mT
    torch.testing.assert_close(conv(x=x, weight=weight, bias=bias), theirs)


@pytest.mark.parametrize("backend", TABLES["causal_conv1d_step"])
def test_decoding_step_by_step_equals_the_whole_sequence(backend):
    if why := why_not("causal_conv1d_step", backend):
        pytest.skip(why)
    step = on_device(causal_conv1d_step, backend)
    whole = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs(2, 9, 3, 4).items()}

    def by_steps(x, weight, bias, initial_state, return_final_state, activation):
        state = initial_state.clone()
        options = dict(state=state, activation=activation)
        return torch.stack([step(x_t, weight, bias, **options) for x_t in x.unbind(1)], 1), state

    assert_agrees(by_steps, reference, **whole, activation="silu")


def test_gradcheck(conv):
    whole = inputs(2, 6, 3, 4, dtype=torch.float64)
    leaves = {name: x for name, x in whole.items() if isinstance(x, torch.Tensor)}

    def run(*values):
        return conv(**dict(zip(leaves, values)), activation="silu", return_final_state=True)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
