"""What every layer does alike: pieces, steps, packed sequences and padding give what whole rows give."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from small_layers import LAYERS, SIZE, layer_of
from torch import Tensor

from lcikernels.layers import Mamba, Mamba2, Retention

EXACT = {"rtol": 0, "atol": 1e-11}  # float64, outputs of about 1
# Rotary angles are float32 of a position: 1e-7 relative, whoever counts it.
BOUNDS = [0, 1, 1, 9, 16]  # of one token, of none, and longer than the convolution


@pytest.fixture(params=LAYERS)
def layer(request):
    return layer_of(request.param)


def tokens(B: int, T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, SIZE, dtype=dtype)


def row(state, n: int):
    return type(state)(*(None if x is None else x[n : n + 1] for x in state))


def assert_same(state, other) -> None:
    for x, y in zip(state, other):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, **EXACT)


def test_pieces_that_hand_on_the_state_equal_the_whole_with_gradients(layer):
    x, weights = tokens(2, 16).requires_grad_(), list(layer.parameters())
    whole, end = layer(x, return_state=True)
    out, state = [], layer.allocate_state(2)
    for piece in x.split([1, 2, 7, 6], dim=1):
        before = [u if u is None else u.clone() for u in state]
        y, after = layer(piece, state, return_state=True)
        assert_same(state, before)
        out, state = [*out, y], after
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(torch.cat(out, 1), whole, **EXACT)
    assert_same(state, end)
    cotangent = torch.randn_like(whole)
    one, other = (torch.autograd.grad(y, [x, *weights], cotangent) for y in (torch.cat(out, 1), whole))
    for got, want in zip(one, other):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert want.any()


@torch.no_grad()
def test_steps_equal_the_whole_and_change_the_state_in_place(layer):
    x = tokens(2, 9)
    whole, end = layer(x, return_state=True)
    _, state = layer(x[:, :4], return_state=True)
    places = [None if u is None else u.data_ptr() for u in state]
    for t in range(4, 9):
        torch.testing.assert_close(layer.step(x[:, t], state), whole[:, t], **EXACT)
    assert_same(state, end)
    assert places == [None if u is None else u.data_ptr() for u in state]


@torch.no_grad()
def test_a_fresh_state_is_that_of_no_tokens(layer):
    x = tokens(3, 5)
    state = layer.allocate_state(3)
    torch.testing.assert_close(layer(x, state), layer(x), **EXACT)
    first = layer.step(x[:, 0], state)
    torch.testing.assert_close(first, layer(x)[:, 0], **EXACT)
    small = layer.allocate_state(3, dtype=torch.float32)
    assert small.recurrent.dtype == torch.float32 and small.recurrent.shape == state.recurrent.shape


@pytest.mark.parametrize("carried", [False, True], ids=["from nothing", "from states"])
def test_packed_sequences_give_what_each_gives_alone_with_gradients(layer, carried):
    x, cu_seqlens = tokens(1, 16).requires_grad_(), torch.tensor(BOUNDS, dtype=torch.int32)
    weights = list(layer.parameters())
    states = layer(tokens(4, 3), return_state=True)[1] if carried else None
    packed, ends = layer(x, states, cu_seqlens, return_state=True)
    alone = []
    for n, (start, end) in enumerate(pairwise(BOUNDS)):
        state = None if states is None else row(states, n)
        if start == end:
            continue
        y, state = layer(x[:, start:end], state, return_state=True)
        alone.append(y)
        assert_same(row(ends, n), state)
    assert_same(row(ends, 1), row(layer.allocate_state(4) if states is None else states, 1))
    torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)
    cotangent = torch.randn_like(packed)
    one, other = (
        torch.autograd.grad(y, [x, *weights], cotangent, retain_graph=True)
        for y in (packed, torch.cat(alone, 1))
    )
    for got, want in zip(one, other):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_tokens_that_are_not_kept_reach_neither_another_nor_the_state(layer):
    x, keep = tokens(3, 12), torch.rand(3, 12) < 0.6
    keep[0], keep[1, 5] = False, True
    _, state = layer(tokens(3, 4), return_state=True)
    got, after = layer(x, state, keep=keep, return_state=True)
    for n in range(1, 3):
        want, end = layer(x[n : n + 1, keep[n]], row(state, n), return_state=True)
        torch.testing.assert_close(got[n : n + 1, keep[n]], want, **EXACT)
        assert_same(row(after, n), end)
    assert_same(row(after, 0), row(state, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["to", "made", "half"])
def test_rates_and_steps_stay_in_float32(request, layer, dtype, way):
    exact = {"A_log", "dt_bias", "dt_proj.bias"}
    name = request.node.callspec.params["layer"]
    layer = layer_of(name, torch.float32)
    want = {name: x.clone() for name, x in [*layer.named_parameters(), *layer.named_buffers()]}
    layer(tokens(1, 3, torch.float32)).sum().backward()
    if way == "made":
        layer = LAYERS[name](dtype=dtype)
    else:
        layer = (
            layer.to(dtype) if way == "to" else layer.half() if dtype == torch.float16 else layer.bfloat16()
        )
        for parameter in layer.parameters():
            assert parameter.grad.dtype == parameter.dtype
    for name, x in layer.named_parameters():
        assert x.dtype == (torch.float32 if name in exact else dtype), name
        assert way == "made" or name not in exact or torch.equal(x, want[name])
    for name, x in layer.named_buffers():
        assert x.dtype == torch.float32 and torch.equal(x, want[name])
    state = layer.allocate_state(2)
    assert state.recurrent.dtype == torch.float32


def test_a_16_bit_layer_runs_trains_and_decodes(request, layer):
    layer = layer_of(request.node.callspec.params["layer"], torch.bfloat16)
    x = tokens(2, 7, torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    want = exact(x.double())
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in layer.parameters())
    assert (y.double() - want).norm() < 0.03 * want.norm()
    with torch.no_grad():
        _, state = layer(x[:, :6], return_state=True)
        last = layer.step(x[:, 6], state)
    assert last.dtype == torch.bfloat16
    assert (last.double() - want[:, 6]).norm() < 0.03 * want[:, 6].norm()


def test_autocast_to_bfloat16_is_close_to_float32(request, layer):
    layer = layer_of(request.node.callspec.params["layer"], torch.float32)
    x = tokens(2, 9, torch.float32)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = layer(x, return_state=True)
    got.float().sum().backward()
    assert got.dtype == torch.bfloat16 and state.recurrent.dtype == torch.float32
    assert (got - want).norm() < 0.05 * want.norm()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_copies_and_pickles_compute_the_same(layer):
    x = tokens(2, 5)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
        other.load_state_dict(layer.state_dict())
    state = layer(x, return_state=True)[1]
    assert_same(pickle.loads(pickle.dumps(state)), state)


def test_a_layer_made_without_memory_starts_as_one_made_with_it(request, layer):
    make = LAYERS[request.node.callspec.params["layer"]]
    with torch.device("meta"):
        empty = make()
    assert all(x.is_meta for x in empty.parameters())
    torch.manual_seed(1)
    made = make()
    empty.to_empty(device="cpu")
    torch.manual_seed(1)
    empty.reset_parameters()
    torch.manual_seed(1)
    made.reset_parameters()
    for (name, x), y in zip(empty.named_parameters(), made.parameters()):
        assert torch.equal(x, y), name
    for x, y in zip(empty.buffers(), made.buffers()):
        assert torch.equal(x, y)


def test_what_does_not_fit_is_refused_by_name(layer):
    name, x = type(layer).__name__, tokens(2, 6)
    with pytest.raises(ValueError, match=rf"{name}: x must be \[B, T, hidden_size\] .*=24, got 23"):
        layer(x[..., :23])
    with pytest.raises(ValueError, match=rf"{name}: x must be \[B, hidden_size\], got 3 axes"):
        layer.step(x, layer.allocate_state(2))
    with pytest.raises(ValueError, match=rf"{name}: keep must be bool \[B, T\] = .*, got torch.float32"):
        layer(x, keep=torch.ones(2, 6))
    cu_seqlens, keep = torch.tensor([0, 2, 6], dtype=torch.int32), torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{name}: keep must be None with cu_seqlens"):
        layer(x[:1], None, cu_seqlens, keep=keep)
    with pytest.raises(ValueError, match="cu_seqlens must be given only with B=1"):
        layer(x, None, cu_seqlens)
    with pytest.raises(ValueError, match=rf"{name}: x must be \[B, T, hidden_size\], got 2 axes"):
        layer(x[:, 0])
    with pytest.raises(ValueError, match=rf"{name}: state must be a State, as allocate_state\(2\) makes one"):
        layer.step(x[:, 0], None)
    rows = f"{name}: state must be of 2 rows, or sequences, got one of"
    with pytest.raises(ValueError, match=f"{rows} 3"):
        layer(x, layer.allocate_state(3))
    with pytest.raises(ValueError, match=f"{rows} 1"):
        layer(x[:1], layer.allocate_state(1), cu_seqlens)
    with pytest.raises(ValueError, match=f"{rows} 3"):
        layer.step(x[:, 0], layer.allocate_state(3))
    with pytest.raises(ValueError, match=f"{name}: cu_seqlens must be None in a step"):
        layer(x[:, 0], layer.allocate_state(2), cu_seqlens)
    state = layer.allocate_state(2)
    with pytest.raises(ValueError, match="must be without requires_grad"):
        layer.step(x[:, 0], state)
    assert_same(state, layer.allocate_state(2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mamba(0), "Mamba: hidden_size must be at least 1, got 0"),
        (lambda: Mamba(8, time_step_rank=0), "Mamba: time_step_rank must be at least 1, got 0"),
        (lambda: Mamba2(24), r"Mamba2: head_dim must be a divisor of expand \* hidden_size=48, got 64"),
        (lambda: Mamba2(24, num_heads=5), "Mamba2: num_heads must be a divisor of .*=48, got 5"),
        (lambda: Mamba2(24, num_heads=0), "Mamba2: num_heads must be a divisor of .*=48, got 0"),
        (lambda: Mamba2(32, head_dim=16, num_heads=2), "head_dim must be 32 where num_heads=2 .*, got 16"),
        (lambda: Mamba2(32, num_groups=2), "Mamba2: num_groups must be a divisor of num_heads=1, got 2"),
        (lambda: Mamba2(32, time_step_limit=(0.2, 0.1)), "time_step_limit must be .*, got .*0.2, 0.1"),
        (lambda: Retention(24, 5), "Retention: num_heads must be a divisor of .*, got 5"),
        (lambda: Retention(24, 4, num_kv_heads=3), "num_kv_heads must be a divisor of num_heads=4, got 3"),
        (lambda: Retention(24, 4, rotary_dims=7), "rotary_dims must be such that pairs fit the 6 dims"),
        (lambda: Retention(24, 2, log_decay=[-1.0]), "log_decay must be num_heads=2 numbers, each <= 0"),
        (lambda: Retention(24, 2, log_decay=[-1.0, 0.1]), "log_decay must be num_heads=2 numbers, each <= 0"),
        (lambda: Retention(24, 2, log_decay=[float("nan"), 0]), "log_decay must be num_heads=2 numbers"),
        (
            lambda: Retention(24, 2, log_decay=[-1.0, 0.0], learned_decay=True),
            "log_decay must be below 0 in every head with learned_decay",
        ),
        (lambda: Retention(24, 2, qk_norm="both"), "qk_norm must be None or 'head' or 'all', got 'both'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
