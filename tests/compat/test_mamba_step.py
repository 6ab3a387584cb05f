"""selective_state_update against its equation, element by element of the state, in mamba-ssm's layout."""

import pytest
import torch
from tolerance import assert_agrees
from torch import Tensor
from torch.nn.functional import silu, softplus

from lcikernels.compat.mamba_ssm import selective_state_update
from lcikernels.compat.mamba_ssm import step as module

B, D, H, P, N, G, STATES = 3, 6, 4, 3, 5, 2, 7
BF, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def equation(
    x, state, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    """Every row by itself, one that has a negative index left out."""
    state, y = state.clone().to(x.dtype), torch.zeros_like(x)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    B, C = (M[:, None] if M.dim() == 2 else M for M in (B, C))
    B, C = (M.repeat_interleave(x.shape[1] // M.shape[1], 1) for M in (B, C))
    B, C = (M[:, :, None].expand(*x.shape, -1) if x.dim() == 3 else M for M in (B, C))
    for b in range(x.shape[0]):
        i = b if state_batch_indices is None else int(state_batch_indices[b])
        if i < 0:
            continue
        state[i] = (dt[b, ..., None] * A).exp() * state[i] + (dt[b] * x[b])[..., None] * B[b]
        y[b] = (state[i] * C[b]).sum(-1)
        y[b] += 0 if D is None else D * x[b]
        y[b] *= 1 if z is None else silu(z[b])
    return y, state


def stepped(x, state, **given):
    """The function, and what it made of its state, which keeps its strides."""
    state = state.clone(memory_format=torch.preserve_format)
    return selective_state_update(state, x, **given), state


def inputs(channels=(D,), dtype=F32, maps=None, parameters=F32, groups=(), states=B) -> dict[str, Tensor]:
    return {
        "x": torch.randn(B, *channels).to(dtype),
        "state": torch.randn(states, *channels, N),
        "dt": torch.randn(B, *channels).to(dtype),
        "A": (-torch.rand(*channels, N) - 0.1).to(parameters),
        "B": torch.randn(B, *groups, N).to(maps or dtype),
        "C": torch.randn(B, *groups, N).to(maps or dtype),
        "D": torch.randn(*channels).to(parameters),
        "z": torch.randn(B, *channels).to(dtype),
        "dt_bias": torch.randn(*channels).to(parameters),
    }


def tied(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Mamba-2 calls it: one A, dt, dt_bias and D a head, expanded."""
    expanded = {"A": given["A"][:, :1, :1].expand(H, P, N), "dt": given["dt"][..., :1].expand(B, H, P)}
    return given | expanded | {name: given[name][:, :1].expand(H, P) for name in ("D", "dt_bias")}


def drawn_tied(f):
    """f of inputs whose draws are tied again: each draw makes tensors of their own of them."""
    return lambda **given: f(**tied(given))


KINDS = {
    "channels": ((D,), (), lambda f: f),
    "channels in groups": ((D,), (G,), lambda f: f),
    "heads": ((H, P), (), lambda f: f),
    "heads in groups": ((H, P), (G,), lambda f: f),
    "tied heads": ((H, P), (), drawn_tied),
    "tied heads in groups": ((H, P), (G,), drawn_tied),
}
kinds = pytest.mark.parametrize("channels, groups, draw", KINDS.values(), ids=KINDS)


@kinds
def test_a_step_is_its_equation(channels, groups, draw):
    given = inputs(channels, groups=groups)
    assert_agrees(draw(stepped), draw(equation), **given, dt_softplus=True)


@kinds
@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias"])
def test_what_may_be_left_out(channels, groups, draw, left_out):
    def without(f):
        return lambda **given: f(**given | {left_out: None})

    sides = (draw(without(f)) for f in (stepped, equation))
    assert_agrees(*sides, **inputs(channels, groups=groups), dt_softplus=True)


@kinds
def test_a_step_without_softplus(channels, groups, draw):
    given = inputs(channels, groups=groups)
    given |= {name: given[name].abs() for name in ("dt", "dt_bias")}
    assert_agrees(draw(stepped), draw(equation), **given)


@kinds
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_rows_have_the_states_that_they_name(channels, groups, draw, kind):
    given = inputs(channels, groups=groups, states=STATES)
    indices = torch.tensor([5, -1, 2], dtype=kind)
    assert_agrees(draw(stepped), draw(equation), **given, dt_softplus=True, state_batch_indices=indices)


MIXED = {
    "bfloat16": (BF, BF, F32),
    "bfloat16, maps in float32": (BF, F32, F32),
    "bfloat16 with its parameters": (BF, BF, BF),
    "float16, maps in bfloat16": (F16, BF, F32),
    "float32, maps in bfloat16": (F32, BF, F32),
}


@kinds
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_every_mix_of_dtypes_is_as_exact_as_float32(channels, groups, draw, dtypes):
    assert_agrees(draw(stepped), draw(equation), **inputs(channels, *dtypes, groups=groups), dt_softplus=True)


@kinds
@pytest.mark.parametrize("dtype", [BF, F16], ids=str)
def test_a_state_of_16_bits_is_rounded_once(channels, groups, draw, dtype):
    given = inputs(channels, dtype=F32, groups=groups)

    def narrow(f):
        def run(state, **given):
            y, state = f(state=state.to(dtype), **given)
            return y, state.float() if f is stepped else state

        return run

    sides = narrow(draw(stepped)), narrow(draw(equation))
    given["state"] = given["state"].to(dtype)
    y, state = sides[0](**given)
    truth_y, truth = sides[1](**{name: u.double() for name, u in given.items()} | {})
    assert (y - truth_y).abs().max() <= 1e-5 * truth_y.abs().max()
    assert (state - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()


def test_float64_steps_are_exact():
    given = {name: u.double() for name, u in inputs().items()}
    for expected, got in zip(equation(**given), stepped(**given)):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_tied_heads_are_a_retention(monkeypatch):
    """Five times as fast as channels that each have their own rates."""

    def refuse(*args, **kwargs):
        raise AssertionError("as channels")

    monkeypatch.setattr(module, "selective_scan_step", refuse)
    stepped(**tied(inputs((H, P))), dt_softplus=True)
    with pytest.raises(AssertionError, match="as channels"):
        stepped(**inputs((H, P)), dt_softplus=True)


STRIDES = {
    "heads last": lambda u: u.movedim(1, -1).contiguous().movedim(-1, 1),
    "states first": lambda u: u.mT.contiguous().mT,
    "part of a wider one": lambda u: torch.cat([u, u, u], 2)[:, :, P : 2 * P],
}


@pytest.mark.parametrize("tie", [lambda given: given, tied], ids=["heads", "tied heads"])
@pytest.mark.parametrize("lie", STRIDES.values(), ids=STRIDES)
def test_a_state_of_any_strides_is_updated(lie, tie):
    given = tie(inputs((H, P)))
    dense, strided = given["state"].clone(), lie(given["state"])
    others = {name: u for name, u in given.items() if name not in ("x", "state")} | {"dt_softplus": True}
    y = selective_state_update(dense, given["x"], **others)
    torch.testing.assert_close(selective_state_update(strided, given["x"], **others), y)
    torch.testing.assert_close(strided, dense)
    assert not torch.equal(dense, given["state"])


@kinds
def test_it_has_no_gradient_and_asks_for_no_no_grad(channels, groups, draw):
    given = {name: u.requires_grad_() for name, u in inputs(channels, groups=groups).items()}
    state = given.pop("state")
    before = state.detach().clone()
    y = selective_state_update(state, given.pop("x"), **given)
    assert not y.requires_grad and state.is_leaf and not torch.equal(state, before)


REFUSED = {
    "complex rates": ({"A": torch.ones(D, N, dtype=torch.complex64)}, "A must be real"),
    "no rates": ({"A": None}, "A must be a torch.Tensor, got None"),
    "other states": ({"C": torch.ones(B, N + 1)}, "C must be .* with N=5"),
    "a state of another batch": ({"state": torch.ones(B + 1, D, N)}, "state must be .* with B=3"),
    "an expanded state": ({"state": torch.ones(1, D, N).expand(B, D, N)}, "state must be of elements"),
    "groups that do not divide": (
        {"B": torch.ones(B, 4, N), "C": torch.ones(B, 4, N)},
        "B must be such that its groups divide 6",
    ),
    "a gate of another width": ({"z": torch.ones(B, D + 1)}, "z must be .* with D=6"),
    "a bias elsewhere": ({"dt_bias": torch.ones(D, device="meta")}, "dt_bias must be on cpu"),
    "indices of another batch": (
        {"state_batch_indices": torch.zeros(B + 1, dtype=torch.int32)},
        "state_batch_indices must be .* with B=3",
    ),
    "indices elsewhere": (
        {"state_batch_indices": torch.zeros(B, dtype=torch.int32, device="meta")},
        "state_batch_indices must be on cpu",
    ),
    "integers": ({"D": torch.ones(D, dtype=torch.int64)}, "D must be float32"),
}


@pytest.mark.parametrize("wrong, sentence", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(wrong, sentence):
    with pytest.raises(ValueError, match=f"selective_state_update: {sentence}"):
        selective_state_update(**inputs() | wrong)


@pytest.mark.parametrize("tie", [lambda given: given, tied], ids=["heads", "tied heads"])
def test_an_index_out_of_range_is_refused(tie):
    given = tie(inputs((H, P), states=STATES))
    with pytest.raises(ValueError, match="selective_state_update: state_batch_indices must be below S=7"):
        selective_state_update(**given, state_batch_indices=torch.tensor([0, 1, STATES]))


@pytest.mark.parametrize("channels", [(1, P), (H, 1), (1, 1)], ids=str)
def test_the_stride_of_a_single_head_or_channel_means_nothing(channels):
    given = inputs(channels, states=STATES)
    state = given.pop("state")
    strange = state.movedim(-1, 1).clone(memory_format=torch.contiguous_format).movedim(1, -1)
    strides = [7 if n == 1 else stride for n, stride in zip(state.shape, strange.stride())]
    strange = strange.as_strided(state.shape, strides)
    options = dict(dt_softplus=True, state_batch_indices=torch.tensor([5, -1, 2]))
    y = selective_state_update(strange, **given, **options)
    dense = state.clone()
    torch.testing.assert_close(y, selective_state_update(dense, **given, **options))
    torch.testing.assert_close(strange, dense)


@pytest.mark.parametrize("name", ["D", "dt_bias", "A", "z"])
@pytest.mark.parametrize("tie", [lambda given: given, tied], ids=["heads", "tied heads"])
def test_one_argument_may_be_float64(tie, name):
    given = inputs((H, P))
    state, more = given.pop("state"), given | {name: given[name].double()}
    y, y_more = (selective_state_update(state.clone(), **tie(x), dt_softplus=True) for x in (given, more))
    assert y_more.dtype == y.dtype
    torch.testing.assert_close(y_more, y)
