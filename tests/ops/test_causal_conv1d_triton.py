"""The convolution in Triton: what the shapes of test_causal_conv1d.py do not reach."""

from math import nan

import pytest
import torch
from devices import GPU, on_device, why_not
from memory import fenced, fences
from tolerance import assert_agrees

from lcikernels import causal_conv1d, causal_conv1d_step
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as reference

if why := why_not("causal_conv1d", "triton"):
    pytest.skip(why, allow_module_level=True)

from lcikernels.ops.causal_conv1d import kernel

conv, conv_step = on_device(causal_conv1d, "triton"), on_device(causal_conv1d_step, "triton")

# B, T, D, W: a tile is 16 tokens and 128 channels here
SHAPES = {
    "a tile and one": (1, 17, 5, 4),
    "two blocks of channels": (1, 3, 130, 3),
    "the filter reaches back two tiles, in three runs": (1, 18, 2, 34),
}
# Around the end of a tile, 16: sequences that end there, start there, and are shorter than the filter.
BOUNDS = [(0, 0, 2, 3, 15, 16, 17, 17, 35, 35), (0, 14, 18, 33)]


def inputs(B, T, D, W, *, N=None, dtype=torch.float32, exact=torch.float32):
    arguments = {
        "x": torch.randn(B, T, D, dtype=dtype, requires_grad=True),
        "weight": torch.randn(D, W, dtype=exact, requires_grad=True),
        "bias": torch.randn(D, dtype=exact, requires_grad=True),
        "activation": "silu",
    }
    if W > 1:
        arguments["initial_state"] = torch.randn(N or B, D, W - 1, requires_grad=True)
        arguments["return_final_state"] = True
    return arguments


def run(arguments):
    """Outputs, and the gradients from random cotangents."""
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = conv(**arguments)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, cotangents)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_to_cut_the_work_is_as_exact_as_the_reference(shape, poisoned):
    assert_agrees(conv, reference, **inputs(*shape))


@pytest.mark.parametrize("W", [4, 7])
@pytest.mark.parametrize("missing", ["bias", "initial_state", "activation", "return_final_state"])
def test_what_is_optional_can_be_left_out(missing, W, poisoned):
    arguments = inputs(2, 5, 3, W)
    del arguments[missing]
    assert_agrees(conv, reference, **arguments)


@pytest.mark.parametrize("bounds, W", [*zip(BOUNDS * 2, [4, 7, 2, 1])], ids=str)
def test_packed_sequences_are_cut_at_tiles_too(bounds, W, poisoned):
    packed = inputs(1, bounds[-1], 3, W, N=len(bounds) - 1)
    packed["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    assert_agrees(conv, reference, **packed)


BROKEN = [(5, 40, -3, 18), (18, 18, 18, 0), (0, 0, 0, 3), (2**30, -(2**30), 7, 99)]


@pytest.mark.parametrize("bounds, W", [*((x, 4) for x in BROKEN), (BROKEN[0], 5), (BROKEN[3], 5)], ids=str)
def test_boundaries_nobody_looked_at_lead_to_no_memory_but_the_arguments(bounds, W, monkeypatch):
    monkeypatch.setattr(kernel, "looked_at", lambda cu_seqlens: False)
    packed = inputs(1, 18, 3, W, N=3)
    packed = {name: fenced(x, nan) if isinstance(x, torch.Tensor) else x for name, x in packed.items()}
    with fences():
        results = run(packed | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
    assert not any(x.isnan().any() for x in results)


@pytest.mark.parametrize("W, parameters", [(4, "float32"), (5, "same")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_computed_and_summed_in_float32(dtype, parameters, W, poisoned):
    exact = dtype if parameters == "same" else torch.float32
    assert_agrees(conv, reference, **inputs(1, 18, 3, W, dtype=dtype, exact=exact))


@pytest.mark.parametrize("W", [4, 5])
def test_channels_of_a_wider_projection_need_no_copy(W):
    """And have the same bits as a copy."""
    part = torch.randn(2, 18, 2 * 35).chunk(2, -1)[1]
    arguments = inputs(2, 18, 35, W) | {"x": part.detach().requires_grad_()}
    assert not arguments["x"].is_contiguous()
    copied = arguments | {"x": part.clone(memory_format=torch.contiguous_format).requires_grad_()}
    assert all(torch.equal(x, y) for x, y in zip(run(arguments), run(copied)))
    transposed = torch.randn(2, 35, 18).mT
    copied = transposed.clone(memory_format=torch.contiguous_format)
    weight = arguments["weight"]
    assert torch.equal(conv(x=transposed, weight=weight), conv(x=copied, weight=weight))


@pytest.mark.parametrize("W", [4, 5])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "initial_state"])
def test_a_nan_stays_in_its_sequence_and_channel(where, W):
    clean = inputs(2, 18, 6, W)
    dirty = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
    place = {"x": (0, 17, 5), "weight": (5, 2), "bias": (5,), "initial_state": (0, 5, 1)}[where]
    dirty[where][place] = torch.nan
    dirty = {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in dirty.items()}
    got, want = run(dirty), run(clean)
    assert got[0][0, :, 5].isnan().any()
    for x, y in zip(got, want):
        channels = next(axis for axis, size in enumerate(x.shape) if size == 6)
        x, y = x.movedim(channels, 0), y.movedim(channels, 0)
        assert torch.equal(x[:5], y[:5])
        if where in ("x", "initial_state") and x.dim() == 3:  # not the sums over sequences
            assert torch.equal(x[5, 1], y[5, 1])


@pytest.mark.parametrize("W", [4, 5])
def test_a_nan_in_the_last_token_reaches_the_gradient_of_the_last_tap_alone(W):
    arguments = inputs(1, 18, 3, W) | {"activation": None}
    arguments["x"] = arguments["x"].detach()
    arguments["x"][0, -1, 1] = torch.nan
    dweight = run(arguments)[2]
    assert dweight.isnan().nonzero().tolist() == [[1, W - 1]]


@pytest.mark.parametrize("W", [1, 2, 4, 40, 150])
def test_a_step_equals_the_sequence_of_one_token(W, poisoned):
    def step(x, weight, bias, activation, initial_state=None, return_final_state=False):
        state = x.new_zeros(2, 5, 0) if initial_state is None else initial_state.clone()
        y = conv_step(x[:, 0], weight, bias, activation=activation, state=state)[:, None]
        return (y, state) if return_final_state else y

    whole = inputs(2, 1, 5, W)
    whole = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in whole.items()}
    assert_agrees(step, reference, **whole)
    assert_agrees(step, reference, **whole | {"bias": None, "activation": None})


def test_a_step_updates_the_state_it_was_given_whatever_its_strides():
    wide, weight, dense = (torch.randn(*shape, device=GPU) for shape in ((3, 2 * 21), (21, 4), (3, 21, 3)))
    state = dense.mT.contiguous().mT
    assert not state.is_contiguous()
    x = wide[:, 21:]
    y = causal_conv1d_step(x, weight, state=state, backend="triton")
    assert torch.equal(y, causal_conv1d_step(x.contiguous(), weight, state=dense, backend="triton"))
    assert torch.equal(state, dense)


def test_torch_compile_takes_it_whole():
    arguments = {name: x for name, x in inputs(1, 5, 3, 4).items() if name != "return_final_state"}

    def conv(x, weight, bias, activation, initial_state):
        tensors = (u.to(GPU) for u in (x, weight, bias))
        state = initial_state.to(GPU)
        return torch.ops.lcikernels.causal_conv1d(*tensors, activation, state, None, "triton")

    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    want, got = conv(**arguments), compiled(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    for x, y in zip(*(torch.autograd.grad(sum(x.sum() for x in out), leaves) for out in (got, want))):
        assert torch.equal(x, y)
