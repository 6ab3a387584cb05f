"""What only the Triton kernels do: many chunks, segments, and compiling for every GPU."""

import pytest
import torch
from ops.test_selective_scan import inputs
from tolerance import assert_agrees

from lcikernels import selective_scan
from lcikernels.backends import TABLES
from lcikernels.ops.selective_scan import op
from lcikernels.ops.selective_scan.reference import selective_scan as reference

if why := TABLES["selective_scan"]["triton"].why_not(torch.empty(1)):
    pytest.skip(why, allow_module_level=True)

from lcikernels.ops.selective_scan import kernel


def scan(**arguments):
    return selective_scan(**arguments, backend="triton")


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK", 8)
    monkeypatch.setitem(op.CHECKPOINT_EVERY, "triton", 8)


@pytest.mark.parametrize("bounds", [None, (0, 3, 3, 21)], ids=["whole", "packed"])
@pytest.mark.parametrize("segments", [1, 2])
def test_chunks_and_segments_make_a_whole(short_chunks, monkeypatch, segments, bounds, poisoned):
    monkeypatch.setattr(kernel, "segments", lambda *_: segments)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    assert_agrees(scan, reference, **inputs(1, 21, 3, 2, S=bounds and 3), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("G", [None, 2])
def test_two_blocks_of_channels_and_two_warps(short_chunks, G, poisoned):
    assert_agrees(scan, reference, **inputs(1, 5, 68, 18, G))


def outputs_and_gradients(arguments):
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    y, state = scan(**arguments)
    return [y, state, *torch.autograd.grad((y.sum(), state.sum()), leaves)]


def test_two_runs_give_the_same_bits(short_chunks):
    arguments = inputs(2, 11, 3, 2)
    for first, second in zip(outputs_and_gradients(arguments), outputs_and_gradients(arguments)):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's numpy
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "dt", "z"])
def test_what_is_not_a_number_stays_in_its_sequence_and_channel(short_chunks, name, poison):
    arguments = inputs(1, 12, 3, 2, S=2) | {"cu_seqlens": torch.tensor([0, 7, 12], dtype=torch.int32)}
    clean = scan(**arguments)
    arguments[name].data[0, 3, 1] = poison
    y, state = scan(**arguments)
    assert torch.equal(y[:, 7:], clean[0][:, 7:]) and torch.equal(state[1], clean[1][1])
    others = [0, 2]
    assert torch.equal(y[..., others], clean[0][..., others])
    assert torch.equal(state[:, others], clean[1][:, others])
    assert not y[0, 3, 1].isfinite()
