"""The compiled convolution on every instruction set: what the shapes of tests/ops do not reach."""

import pytest
import torch
from layouts import transposed
from tolerance import assert_agrees

from lcikernels import causal_conv1d, causal_conv1d_step
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as reference

# B, T, D, W: a segment is 256 tokens, a tile 16, a block 512 channels
SHAPES = {
    "one channel": (2, 40, 1, 4),
    "a tile and one, a vector and one": (1, 17, 17, 4),
    "a segment and one": (1, 257, 5, 4),
    "the filter reaches back three segments": (1, 520, 2, 600),
    "two blocks": (2, 18, 515, 3),
    "two taps over two segments": (1, 300, 33, 2),
    "no memory over two segments": (1, 300, 33, 1),
    "five taps": (2, 35, 34, 5),
}
# Around the end of a segment, 256: sequences that end there, start there, and are shorter than the filter.
BOUNDS = [(0, 0, 2, 3, 255, 256, 257, 257, 300, 300), (0, 254, 258, 300), (0, 256, 300)]


def inputs(B, T, D, W, *, N=None, dtype=torch.float32, exact=None):
    full = torch.promote_types(dtype, torch.float32)
    exact = exact or full
    arguments = {
        "x": torch.randn(B, T, D, dtype=dtype, requires_grad=True),
        "weight": torch.randn(D, W, dtype=exact, requires_grad=True),
        "bias": torch.randn(D, dtype=exact, requires_grad=True),
        "activation": "silu",
    }
    if W > 1:
        arguments["initial_state"] = torch.randn(N or B, D, W - 1, dtype=full, requires_grad=True)
        arguments["return_final_state"] = True
    return arguments


def compiled(**arguments):
    return causal_conv1d(**arguments, backend="cpp")


def run(arguments):
    """Outputs, and the gradients from random cotangents."""
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = compiled(**arguments)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, cotangents)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_to_cut_the_work_is_as_exact_as_the_reference(instruction_set, shape, poisoned):
    assert_agrees(compiled, reference, **inputs(*shape))


@pytest.mark.parametrize("missing", ["bias", "initial_state", "activation"])
def test_what_is_optional_can_be_left_out(instruction_set, missing, poisoned):
    assert_agrees(compiled, reference, **inputs(2, 21, 18, 4) | {missing: None})


@pytest.mark.parametrize("W", [2, 4, 7])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_packed_sequences_are_cut_at_segments_too(instruction_set, bounds, W, poisoned):
    packed = inputs(1, bounds[-1], 18, W, N=len(bounds) - 1)
    packed["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    assert_agrees(compiled, reference, **packed)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_is_computed_and_summed_in_float32(instruction_set, parameters, poisoned):
    assert_agrees(compiled, reference, **inputs(1, 300, 33, 4, dtype=torch.bfloat16, exact=parameters))


def test_sums_over_many_tokens_stay_exact(instruction_set):
    assert_agrees(compiled, reference, **inputs(1, 4096, 3, 4))


def test_float64_is_exact_to_float64(instruction_set):
    arguments = inputs(1, 270, 19, 4, dtype=torch.float64)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    got, want = (
        torch.autograd.grad(sum(x.sum() for x in op(**arguments)), leaves) for op in (compiled, reference)
    )
    for x, y in zip(got, want):
        assert (x - y).abs().max() <= 1e-13 * y.abs().max()


@pytest.mark.parametrize("layout", [torch.clone, transposed])
def test_what_goes_past_the_caches_has_the_same_bits(instruction_set, layout, past_caches):
    """One of two rows fits; they are of no whole number of cache lines."""
    D = 1539

    def results(x):
        x = layout(x).requires_grad_()
        y = compiled(x=x, weight=weight, bias=bias, activation="silu")
        return y, *torch.autograd.grad(y.sum(), x)

    T = 4 * past_caches // (4 * 2 * 2 * D) + 1
    x, weight, bias = torch.randn(2, T, D), torch.randn(D, 4), torch.randn(D)
    whole = results(x)
    for b in range(2):
        assert all(torch.equal(u[b : b + 1], v) for u, v in zip(whole, results(x[b : b + 1])))


def test_channels_of_a_wider_projection_need_no_copy(instruction_set):
    """And have the same bits as a copy."""
    wide = torch.randn(2, 40, 2 * 35)
    part = wide.chunk(2, -1)[1]
    arguments = inputs(2, 40, 35, 4) | {"x": part.detach().requires_grad_()}
    assert not arguments["x"].is_contiguous()
    copied = arguments | {"x": part.clone(memory_format=torch.contiguous_format).requires_grad_()}
    assert all(torch.equal(x, y) for x, y in zip(run(arguments), run(copied)))
    transposed = torch.randn(2, 35, 40).mT
    copied = transposed.clone(memory_format=torch.contiguous_format)
    assert torch.equal(
        compiled(x=transposed, weight=arguments["weight"]), compiled(x=copied, weight=arguments["weight"])
    )


def test_the_number_of_threads_changes_no_bit(instruction_set):
    arguments = inputs(1, 1100, 70, 4)
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


@pytest.mark.parametrize("where", ["x", "weight", "bias", "initial_state"])
def test_a_nan_stays_in_its_sequence_and_channel(instruction_set, where):
    clean = inputs(2, 270, 18, 4)
    dirty = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
    place = {"x": (0, 255, 17), "weight": (17, 2), "bias": (17,), "initial_state": (0, 17, 1)}[where]
    dirty[where][place] = torch.nan
    dirty = {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in dirty.items()}
    got, want = run(dirty), run(clean)
    assert got[0][0, :, 17].isnan().any()
    for x, y in zip(got, want):
        channels = next(axis for axis, size in enumerate(x.shape) if size == 18)
        x, y = x.movedim(channels, 0), y.movedim(channels, 0)
        assert torch.equal(x[:17], y[:17])
        if where in ("x", "initial_state") and x.dim() == 3:  # not the sums over sequences
            assert torch.equal(x[17, 1], y[17, 1])


@pytest.mark.parametrize("W", [1, 2, 3, 4, 6, 600])
def test_a_step_equals_the_sequence_of_one_token(instruction_set, W, poisoned):
    def step(x, weight, bias, activation, initial_state=None, return_final_state=False):
        state = x.new_zeros(2, 19, 0) if initial_state is None else initial_state.clone()
        options = dict(activation=activation, state=state, backend="cpp")
        y = causal_conv1d_step(x[:, 0], weight, bias, **options)[:, None]
        return (y, state) if return_final_state else y

    whole = inputs(2, 1, 19, W)
    whole = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in whole.items()}
    assert_agrees(step, reference, **whole)
    assert_agrees(step, reference, **whole | {"bias": None, "activation": None})


def test_a_step_updates_the_state_it_was_given_whatever_its_strides(instruction_set):
    wide, weight, dense = torch.randn(3, 2 * 21), torch.randn(21, 4), torch.randn(3, 21, 3)
    state = dense.mT.contiguous().mT
    assert not state.is_contiguous()
    x = wide[:, 21:]
    y = causal_conv1d_step(x, weight, state=state, backend="cpp")
    assert torch.equal(y, causal_conv1d_step(x.contiguous(), weight, state=dense, backend="cpp"))
    assert torch.equal(state, dense)
