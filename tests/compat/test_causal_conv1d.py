"""causal-conv1d's functions against their equation, token by token, in their own layout [B, D, L]."""

import pytest
import torch
from tolerance import assert_agrees
from torch import Tensor
from torch.nn.functional import silu

from lcikernels.compat.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)

B, D, L, W = 2, 5, 9, 4


def equation(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None
):
    """Each token from those of its own sequence."""
    batch, channels, length = x.shape
    taps = weight.shape[1]
    past = x.new_zeros(batch, channels, taps - 1) if initial_states is None else initial_states.to(x.dtype)
    whole = torch.cat([past, x], -1)
    y = torch.zeros_like(x)
    for t in range(length):
        window = whole[..., t : t + taps]
        if seq_idx is not None:
            window = torch.stack([keep(window[b], seq_idx[b], t, taps) for b in range(batch)])
        sums = (window * weight).sum(-1)
        sums = sums if bias is None else sums + bias
        sums = sums if activation is None else silu(sums)
        if seq_idx is not None:
            sums = torch.where(seq_idx[:, t, None] < 0, 0, sums)
        y[..., t] = sums
    return (y, whole[..., length:]) if return_final_states else y


def keep(window: Tensor, numbers: Tensor, t: int, taps: int) -> Tensor:
    """The window that ends at t, 0 where another number, or the row's beginning, is between."""
    own, same = [], True
    for s in range(t, t - taps, -1):
        same = same and s >= 0 and bool(numbers[s] == numbers[t])
        own.append(same)
    return window * torch.tensor(own[::-1])


def inputs(dtype=torch.float32, weight=None, length=L) -> dict[str, Tensor]:
    weight = weight or dtype
    return {
        "x": torch.randn(B, D, length, dtype=dtype, requires_grad=True),
        "weight": torch.randn(D, W, dtype=weight, requires_grad=True),
        "bias": torch.randn(D, dtype=weight, requires_grad=True),
    }


def channels_last(x: Tensor) -> Tensor:
    return x.detach().mT.contiguous().mT.requires_grad_()


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("lie", [lambda x: x, channels_last], ids=["channels first", "channels last"])
def test_each_activation_in_both_layouts(activation, lie):
    given = inputs()
    given["x"] = lie(given["x"])
    assert_agrees(causal_conv1d_fn, equation, **given, activation=activation)


def test_no_bias():
    given = inputs() | {"bias": None}
    assert_agrees(causal_conv1d_fn, equation, **given)


MIXED = {
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32 weights": (torch.bfloat16, torch.float32),
    "float32, bfloat16 weights": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_dtypes_of_the_layer_and_of_the_weights_may_differ(dtypes):
    assert_agrees(causal_conv1d_fn, equation, **inputs(*dtypes), activation="silu")


@pytest.mark.parametrize("length", [1, 2, L], ids=["one token", "fewer than the filter", "more"])
def test_states_go_in_and_come_out(length):
    state = torch.randn(B, D, W - 1, requires_grad=True)
    options = {"initial_states": state, "return_final_states": True, "activation": "silu"}
    assert_agrees(causal_conv1d_fn, equation, **inputs(length=length), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_have_the_dtype_of_x(dtype):
    given = inputs(dtype) | {"initial_states": torch.randn(B, D, W - 1, dtype=dtype, requires_grad=True)}
    y, state = causal_conv1d_fn(**given, return_final_states=True)
    assert state.dtype == dtype and torch.equal(state, given["x"][..., 1 - W :])
    assert_agrees(causal_conv1d_fn, equation, **given)


def test_the_final_states_are_written_where_the_caller_wants_them():
    given, out = inputs(), torch.full((B, W - 1, D), torch.nan).mT
    _, state = causal_conv1d_fn(**given, return_final_states=True, final_states_out=out)
    assert state is out and torch.equal(out, given["x"][..., 1 - W :])
    grad = torch.randn(B, D, W - 1)
    (dx,) = torch.autograd.grad(state, given["x"], grad)
    assert torch.equal(dx[..., 1 - W :], grad) and not dx[..., : 1 - W].any()


NUMBERS = {
    "two": [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]],
    "of one token, of five, and padding": [[3, 4, 4, 4, 4, 4, 7, -1, -1], [-1, -1, 0, 1, 1, 1, 1, 2, 2]],
    "a number that comes back begins another sequence": [[0, 1, 0, 0, 1, 1, 0, 0, 0], [2] * 9],
}


@pytest.mark.parametrize("lie", [lambda x: x, channels_last], ids=["channels first", "channels last"])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_numbered_sequences_do_not_see_each_other(numbers, lie):
    given = inputs()
    given["x"] = lie(given["x"])
    for kind in (torch.int32, torch.int64):
        seq_idx = torch.tensor(numbers, dtype=kind)
        assert_agrees(causal_conv1d_fn, equation, **given, seq_idx=seq_idx, activation="silu")


def test_numbered_sequences_of_one_row_in_bfloat16_without_bias():
    given = inputs(torch.bfloat16) | {"bias": None}
    given["x"] = given["x"].detach()[:1].requires_grad_()
    seq_idx = torch.tensor([NUMBERS["two"][0]], dtype=torch.int32)
    assert_agrees(causal_conv1d_fn, equation, **given, seq_idx=seq_idx)


def test_the_numbered_convolution_is_a_well_made_op():
    from lcikernels.compat import numbered

    x, weight, bias = (u.detach().requires_grad_() for u in inputs().values())
    for u in (x.detach().mT.requires_grad_(), x.detach().mT.contiguous().requires_grad_()):
        for b in (bias, None):
            arguments = (u, weight, b, "silu", torch.tensor(NUMBERS["two"]), "torch")
            torch.library.opcheck(torch.ops.lcikernels.causal_conv1d_numbered.default, arguments)
    assert numbered.packed(torch.tensor(NUMBERS["two"])).tolist() == [0, 4, 9, 11, 18]


def stepped(conv_state, **given):
    """The update, and what it made of its state."""
    state = conv_state.clone(memory_format=torch.preserve_format)
    return causal_conv1d_update(conv_state=state, **given), state


def one_by_one(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    """Each row's own tokens in a list, which the state is read into and written from."""
    state = conv_state.clone()
    x3 = x if x.dim() == 3 else x[..., None]
    S, taps = state.shape[2], weight.shape[1]
    y = torch.zeros_like(x3)
    for b in range(x3.shape[0]):
        i = b if conv_state_indices is None else int(conv_state_indices[b])
        if i < 0:
            continue
        for t in range(x3.shape[2]):
            if cache_seqlens is None:
                past = [state[i, :, s].clone() for s in range(S)]
            else:
                p = int(cache_seqlens[b]) + t
                past = [state[i, :, (p - S + s) % S].clone() for s in range(S)]
            window = torch.stack([*past, x3[b, :, t]], -1)[:, -taps:]
            sums = (window * weight).sum(-1)
            sums = sums if bias is None else sums + bias
            y[b, :, t] = sums if activation is None else silu(sums)
            if cache_seqlens is None:
                state[i] = torch.stack([*past[1:], x3[b, :, t]], -1)
            else:
                state[i, :, p % S] = x3[b, :, t]
    return y.view(x.shape), state


UPDATES = {
    "one token": ((), W - 1, {}),
    "one token, on an axis": ((1,), W - 1, {}),
    "several tokens": ((6,), W - 1, {}),
    "a state of W tokens": ((), W, {}),
    "several tokens, a longer state": ((3,), 7, {}),
    "a ring": ((), 6, {"cache_seqlens": [4, 17]}),
    "a ring, from its beginning": ((), W - 1, {"cache_seqlens": [0, 1]}),
    "a ring that several tokens close": ((5,), 6, {"cache_seqlens": [4, 17]}),
    "states chosen": ((), W - 1, {"conv_state_indices": [3, 1]}),
    "states chosen, and padding": ((), W, {"conv_state_indices": [-1, 4]}),
    "all of it": ((3,), 6, {"conv_state_indices": [2, -1], "cache_seqlens": [5, 9]}),
}


@pytest.mark.parametrize("case", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("activation", [None, "swish"])
def test_an_update_continues_from_its_state(case, activation):
    tokens, S, options = case
    options = {name: torch.tensor(u, dtype=torch.int32) for name, u in options.items()}
    states = 5 if "conv_state_indices" in options else B
    given = {"x": torch.randn(B, D, *tokens), "conv_state": torch.randn(states, D, S)}
    given |= {"weight": torch.randn(D, W), "bias": torch.randn(D)}
    assert_agrees(stepped, one_by_one, **given, **options, activation=activation)
    assert_agrees(stepped, one_by_one, **given | {"bias": None}, **options, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_update_keeps_the_dtype_of_its_state(dtype):
    x, state = torch.randn(B, D, 3, dtype=dtype), torch.randn(B, D, W, dtype=dtype)
    weight, bias = torch.randn(D, W, dtype=dtype), torch.randn(D, dtype=dtype)
    expected = torch.cat([state, x], -1)[..., -W:]
    truth, _ = one_by_one(*(u.double() for u in (x, state, weight, bias)))
    y = causal_conv1d_update(x, state, weight, bias)
    assert y.dtype == dtype and torch.equal(state, expected)
    torch.testing.assert_close(y.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6 * truth.abs().max())


def test_an_update_has_no_gradient_and_asks_for_no_no_grad():
    given = inputs()
    state = torch.randn(B, D, W, requires_grad=True)
    y = causal_conv1d_update(given["x"][..., 0], state, given["weight"], given["bias"])
    assert not y.requires_grad and torch.equal(state[..., -1], given["x"][..., 0])


def test_the_last_tokens_of_packed_sequences():
    x, bounds = torch.randn(12, D), [0, 2, 2, 9, 12]
    states = causal_conv1d_varlen_states(x, torch.tensor(bounds, dtype=torch.int32), 3)
    assert states.shape == (4, D, 3)
    for state, start, end in zip(states, bounds, bounds[1:]):
        expected = torch.cat([x.new_zeros(3, D), x[start:end]])[-3:].mT
        assert torch.equal(state, expected)


@pytest.mark.parametrize(
    "bounds, length, sentence",
    [
        ([0.0, 12.0], 3, r"cu_seqlens must be int32 or int64 \[N\+1\], got torch.float32"),
        ([0, 5, 14], 3, r"cu_seqlens must be 0 first, T=12 last and never falling, got \[0, 5, 14\]"),
        ([0, 7, 5, 12], 3, "cu_seqlens must be 0 first, T=12 last and never falling"),
        ([0, 12], -1, "state_len must be at least 0, got -1"),
    ],
)
def test_the_last_tokens_of_no_sequences_are_refused_by_name(bounds, length, sentence):
    with pytest.raises(ValueError, match=f"causal_conv1d_varlen_states: {sentence}"):
        causal_conv1d_varlen_states(torch.ones(12, D), torch.tensor(bounds), length)


LARGE, INDEX = torch.ones(B, D, L), torch.zeros(B, L, dtype=torch.int32)
REFUSED = {
    "gelu": (dict(activation="gelu"), "activation must be None or 'silu' or 'swish', got 'gelu'"),
    "no tensor": (dict(x=None), "x must be a torch.Tensor, got None"),
    "no tokens": (dict(x=torch.ones(B, D, 0)), "x must be .* with L at least 1"),
    "another width": (dict(weight=torch.ones(D + 1, W)), "weight must be .* with D=5"),
    "integers": (dict(weight=torch.ones(D, W, dtype=torch.int32)), "weight must be float32"),
    "numbers of another length": (dict(seq_idx=INDEX[:, 1:]), "seq_idx must be .* with L=9"),
    "numbers that are none": (dict(seq_idx=INDEX.float()), "seq_idx must be int32 or int64"),
    "numbers and a state": (dict(seq_idx=INDEX, initial_states=LARGE[..., :3]), "initial_states must be"),
    "numbers, a state out": (dict(seq_idx=INDEX, return_final_states=True), "return_final_states must be"),
    "a place for nothing": (dict(final_states_out=LARGE[..., :3]), "final_states_out must be given with"),
    "a place for nothing, of sequences": (
        dict(final_states_out=LARGE[..., :3], seq_idx=INDEX),
        "final_states_out must be given with",
    ),
    "a place for integers": (
        dict(final_states_out=LARGE[..., :3].int(), return_final_states=True),
        "final_states_out must be float32",
    ),
    "a place that is none": (
        dict(final_states_out=torch.ones(1, D, 3).expand(B, D, 3), return_final_states=True),
        "final_states_out must be of elements of its own",
    ),
    "a place elsewhere": (
        dict(final_states_out=torch.ones(B, D, 3, device="meta"), return_final_states=True),
        "final_states_out must be on cpu",
    ),
    "a short state": (dict(initial_states=LARGE[..., :2]), "initial_states must be .* with W-1=3"),
    "another device": (dict(bias=torch.ones(D, device="meta")), "bias must be on cpu"),
    "numbers elsewhere": (dict(seq_idx=INDEX.to("meta")), "seq_idx must be on cpu"),
}


@pytest.mark.parametrize("given, sentence", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(given, sentence):
    fits = {"x": LARGE, "weight": torch.ones(D, W), "bias": torch.ones(D)}
    causal_conv1d_fn(**fits)
    with pytest.raises(ValueError, match=f"causal_conv1d_fn: {sentence}"):
        causal_conv1d_fn(**fits | given)


INDICES = torch.zeros(B, dtype=torch.int32)
REFUSED_UPDATES = {
    "gelu": (dict(activation="gelu"), "activation must be None or 'silu' or 'swish'"),
    "a short state": (dict(conv_state=LARGE[..., :2]), "conv_state must be of at least W-1=3 tokens"),
    "a shared state": (dict(conv_state=torch.ones(1, D, W).expand(B, D, W)), "conv_state must be of elem"),
    "another batch": (dict(conv_state=torch.ones(B + 1, D, W)), "conv_state must be .* with B=2"),
    "indices of another batch": (
        dict(conv_state_indices=INDICES[1:]),
        "conv_state_indices must be .* with B=2",
    ),
    "indices elsewhere": (dict(conv_state_indices=INDICES.to("meta")), "conv_state_indices must be on cpu"),
    "lengths of another batch": (dict(cache_seqlens=INDICES[1:]), "cache_seqlens must be .* with B=2"),
    "an index out of range": (dict(conv_state_indices=INDICES + 9), "conv_state_indices must be below S=2"),
    "lengths in float": (dict(cache_seqlens=INDICES.float()), "cache_seqlens must be int32 or int64"),
}


@pytest.mark.parametrize("given, sentence", REFUSED_UPDATES.values(), ids=REFUSED_UPDATES)
def test_an_update_refuses_by_name(given, sentence):
    fits = {"x": torch.ones(B, D), "conv_state": torch.ones(B, D, W), "weight": torch.ones(D, W)}
    causal_conv1d_update(**{**fits, "conv_state": fits["conv_state"].clone()})
    with pytest.raises(ValueError, match=f"causal_conv1d_update: {sentence}"):
        causal_conv1d_update(**fits | given)
