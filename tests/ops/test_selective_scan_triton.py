"""The scan in Triton: how it cuts the line of tokens, and what test_selective_scan.py does not reach."""

from math import nan

import pytest
import torch
from devices import on_device, why_not
from memory import Memory, fenced, fences, without_launches
from ops.test_selective_scan import inputs
from tolerance import assert_agrees

from lcikernels import selective_scan, selective_scan_step
from lcikernels.ops import tuned
from lcikernels.ops.selective_scan import op
from lcikernels.ops.selective_scan.reference import selective_scan as reference

if why := why_not("selective_scan", "triton"):
    pytest.skip(why, allow_module_level=True)

from lcikernels.ops.selective_scan import kernel, tiles

scan = on_device(selective_scan, "triton")


@pytest.fixture
def short_chunks(monkeypatch):
    """Of 8 tokens; slabs too, or 4 for a segment."""
    for module in (kernel, tiles):
        monkeypatch.setattr(module, "CHUNK", 8)
        monkeypatch.setattr(module, "SHORT", 8)
    monkeypatch.setitem(op.CHECKPOINT_EVERY, "triton", 8)


def cut_to(monkeypatch, tokens: int):
    """Segments of so many tokens."""
    monkeypatch.setattr(kernel, "cut", lambda *_: tokens)


@pytest.mark.parametrize("segment", [8, 16, 40])
def test_segments_and_slabs_of_a_sequence_make_a_whole(short_chunks, monkeypatch, segment, poisoned):
    cut_to(monkeypatch, segment)
    assert_agrees(scan, reference, **inputs(1, 29, 5, 4))


@pytest.mark.parametrize("segment", [13, 26, 16])  # rows, two rows, across rows
def test_a_segment_may_hold_several_rows_or_a_part(short_chunks, monkeypatch, segment, poisoned):
    cut_to(monkeypatch, segment)
    assert_agrees(scan, reference, **inputs(4, 13, 5, 4))


# Around multiples of 8: sequences that begin, end and go on there, long, short and empty ones.
BOUNDS = [(0, 3, 3, 21), (0, 0, 8, 8, 9, 16, 26, 26), (0, 20, 21), (0, 8, 16, 16)]


@pytest.mark.parametrize("bounds, segment", [*zip(BOUNDS, [8, 24, 8, 24]), (BOUNDS[1], 8)], ids=str)
def test_segments_hold_any_part_of_packed_sequences(short_chunks, monkeypatch, bounds, segment, poisoned):
    cut_to(monkeypatch, segment)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert_agrees(scan, reference, **inputs(1, bounds[-1], 5, 4, S=len(bounds) - 1), cu_seqlens=cu_seqlens)


def test_chunks_as_they_are(poisoned):
    assert_agrees(scan, reference, **inputs(1, 70, 20, 2))


@pytest.mark.parametrize("shape", [(1, 5, 68, 18, None), (1, 5, 68, 18, 2)], ids=str)
def test_blocks_of_channels_and_states_in_several_warps(short_chunks, shape, poisoned):
    assert_agrees(scan, reference, **inputs(*shape))


def test_half_a_warp_of_channels(short_chunks, poisoned):
    """Few states count: the interpreter adds them one after another, which loses more than a GPU's tree."""
    arguments = inputs(1, 3, 18, 130)
    arguments["b"].data[..., 3:-3] = arguments["c"].data[..., 3:-3] = 0
    assert_agrees(scan, reference, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_computed_and_summed_in_float32(short_chunks, dtype, poisoned):
    assert_agrees(scan, reference, **inputs(1, 18, 3, 2, dtype=dtype))


@pytest.mark.parametrize("steps", [1, 2])
def test_one_token_or_two_in_registers_are_the_same(short_chunks, monkeypatch, steps, poisoned):
    monkeypatch.setattr(kernel, "chosen", lambda *_: tiles.Tiles(2, 32, 1, steps, 4))
    assert_agrees(scan, reference, **inputs(1, 19, 20, 2))


def test_how_the_line_is_cut():
    def segments(B, T, blocks, chips=132):
        return -(-B * T // kernel.cut(B, T, blocks, chips)), kernel.cut(B, T, blocks, chips)

    assert segments(8, 4096, 64) == (8, 4096)  # 512 warps: a row each
    assert segments(1, 65536, 64) == (9, 7296)  # 64 would leave most of the GPU idle
    assert segments(1, 1024, 64) == (4, 256)  # not into parts of less
    assert segments(1024, 64, 64) == (16, 4096)
    assert segments(64, 128, 1) == (64, 128)
    assert segments(1, 65536, 400) == (1, 65536)
    for shape in ((3, 1000, 64), (1, 999, 2), (7, 300, 100)):
        parts, tokens = segments(*shape)
        assert tokens % kernel.CHUNK == 0 or tokens % shape[1] == 0
        assert parts * tokens >= shape[0] * shape[1]


def outputs_and_gradients(arguments):
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    y, state = scan(**arguments)
    return [y, state, *torch.autograd.grad((y.sum(), state.sum()), leaves)]


def test_two_runs_give_the_same_bits(short_chunks, monkeypatch):
    cut_to(monkeypatch, 16)
    arguments = inputs(2, 21, 3, 2)
    for first, second in zip(outputs_and_gradients(arguments), outputs_and_gradients(arguments)):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's numpy
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name, segment", [("x", 8), ("dt", 64), ("z", 8)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_sequence_and_channel(
    short_chunks, monkeypatch, name, poison, segment
):
    cut_to(monkeypatch, segment)
    arguments = inputs(1, 21, 3, 2, S=2) | {"cu_seqlens": torch.tensor([0, 17, 21], dtype=torch.int32)}
    clean = outputs_and_gradients(arguments)
    arguments[name].data[0, 3, 1] = poison
    dirty = outputs_and_gradients(arguments)
    assert not dirty[0][0, 3, 1].isfinite()
    names = [
        "y",
        "state",
        *(k for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad),
    ]
    others = [0, 2]
    for what, got, want in zip(names, dirty, clean):
        if what in ("y", "x", "dt", "z"):
            assert torch.equal(got[:, 17:], want[:, 17:]) and torch.equal(got[..., others], want[..., others])
        elif what in ("state", "initial_state"):
            assert torch.equal(got[1], want[1]) and torch.equal(got[:, others], want[:, others])
        elif what in ("b", "c"):
            assert torch.equal(got[:, 17:], want[:, 17:])
        else:
            assert torch.equal(got[others], want[others])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_segment_whose_growth_overflows_leaves_a_state_of_zero_alone(short_chunks, monkeypatch):
    cut_to(monkeypatch, 8)
    arguments = {name: x for name, x in inputs(1, 24, 2, 2).items() if name in ("x", "dt", "a", "b", "c")}
    arguments = {name: x.detach() for name, x in arguments.items()}
    arguments["dt"], arguments["a"] = torch.full((1, 24, 2), 0.1), torch.full((2, 2), 3.0)
    arguments["dt"][:, :20], arguments["x"][:, :20] = 10, 0
    assert_agrees(scan, reference, **arguments)


def test_more_states_than_a_program_holds_are_refused_before_a_launch():
    x, b = torch.zeros(1, 2, 3), torch.zeros(1, 2, 300)
    why = "selective_scan: a must be .D, N. with N at most 256 for backend 'triton', got 300"
    with pytest.raises(ValueError, match=why):
        scan(x, x, torch.zeros(3, 300), b, b)
    step, state = on_device(selective_scan_step, "triton"), torch.zeros(1, 3, 300)
    with pytest.raises(ValueError, match=why):
        step(x[:, 0], x[:, 0], torch.zeros(3, 300), b[:, 0], b[:, 0], state=state)


@pytest.mark.parametrize("shape", [(2, 1, 5, 3, None), (2, 1, 68, 18, 2)], ids=str)
def test_a_step_equals_the_sequence_of_one_token(shape, poisoned):
    def step(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, return_final_state):
        x, dt, b, c, z = (u[:, 0] for u in (x, dt, b, c, z))
        state, options = initial_state.clone(), dict(z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)
        y = on_device(selective_scan_step, "triton")(x, dt, a, b, c, d, state=state, **options)
        return y[:, None], state

    whole = inputs(*shape)
    whole = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in whole.items()}
    assert_agrees(step, reference, **whole)


def test_a_step_updates_a_state_of_any_strides():
    x, b, a = torch.randn(2, 5), torch.randn(2, 3), -torch.rand(5, 3)
    dense = torch.randn(2, 5, 3)
    state = dense.mT.contiguous().mT
    step = on_device(selective_scan_step, "triton")
    y = step(x, x.abs(), a, b, b, state=state)
    torch.testing.assert_close(y, step(x, x.abs(), a, b, b, state=dense))  # sums may go in another order
    torch.testing.assert_close(state, dense)


@pytest.mark.parametrize("processors, sm", [(132, 90), (108, 80)], ids=["H200", "A100"])
def test_memory_is_at_most_a_fifth_more_than_inputs_and_outputs(processors, sm, monkeypatch):
    without_launches(monkeypatch, kernel, processors, sm)
    B, T, D, N = 8, 4096, 2048, 16
    with Memory() as memory, torch.device("meta"):
        x, dt, z, dy = (torch.empty(B, T, D, dtype=torch.bfloat16) for _ in range(4))
        b, c = (torch.empty(B, T, N, dtype=torch.bfloat16) for _ in range(2))
        inputs = x, dt, torch.empty(D, N), b, c, torch.empty(D), z, torch.empty(D), True, None, None
        y, _, checkpoints = kernel.forward(*inputs, kernel.CHUNK)
        grads = kernel.backward(dy, None, *inputs, checkpoints, kernel.CHUNK)
    given = [u for u in (*inputs, dy, y, *grads) if isinstance(u, torch.Tensor)]
    assert memory.most <= 1.2 * sum(u.untyped_storage().nbytes() for u in given)


def test_a_measured_configuration_wins_while_it_is_a_candidate(monkeypatch):
    best, other = tiles.candidates(16, 90, True)
    table = {tiles.key(16, True): list(other), tiles.key(8, True): [8, 32, 7, 1, 4]}
    monkeypatch.setattr(tuned, "measured", lambda op, gpu: {"": {}, "one": table}[gpu])
    assert tiles.chosen(16, 90, True) == best
    assert tiles.chosen(16, 90, True, gpu="one") == other
    assert tiles.chosen(8, 90, True, gpu="one") == tiles.candidates(8, 90, True)[0]


BROKEN = [(5, 40, -3, 12), (12, 12, 12, 0), (0, 0, 0, 3), (2**30, -(2**30), 7, 99)]


@pytest.mark.parametrize("bounds", BROKEN, ids=str)
def test_boundaries_nobody_looked_at_lead_to_no_memory_but_the_arguments(short_chunks, monkeypatch, bounds):
    monkeypatch.setattr(kernel, "looked_at", lambda cu_seqlens: False)
    packed = inputs(1, 12, 3, 2, S=3)
    packed = {name: fenced(x, nan) if isinstance(x, torch.Tensor) else x for name, x in packed.items()}
    with fences():
        results = outputs_and_gradients(packed | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
    assert not any(x.isnan().any() for x in results)
