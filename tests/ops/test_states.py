"""The states that callers have: of 16 bits, of any strides, some of many, circular; on every backend.

A step on such a state is the step on a dense float32 copy of it, rounded once.
"""

import pytest
import torch
from devices import GPU, able
from layouts import spaced, transposed
from tolerance import assert_agrees
from torch.testing import assert_close

from lcikernels import (
    causal_conv1d,
    causal_conv1d_step,
    retention,
    retention_step,
    selective_scan,
    selective_scan_step,
)
from lcikernels.backends import TABLES
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as conv_reference
from lcikernels.ops.retention.reference import retention as retention_reference
from lcikernels.ops.selective_scan.reference import selective_scan as scan_reference

R = torch.randn
B, H, K, V, D, G, N, W = 3, 4, 5, 20, 6, 2, 18, 4
# Each op: what it takes of one token, the shape of a state.
STEPS = {
    "retention_step": (
        retention_step,
        dict(q=R(B, H, K), k=R(B, 2, K), v=R(B, H, V), log_decay=-torch.rand(B, H), scale=0.3),
        (H, K, V),
    ),
    "selective_scan_step": (
        selective_scan_step,
        dict(x=R(B, D), dt=R(B, D), a=-torch.rand(D, N), b=R(B, G, N), c=R(B, G, N), d=R(D), z=R(B, D))
        | dict(dt_bias=R(D), dt_softplus=True),
        (D, N),
    ),
    "causal_conv1d_step": (
        causal_conv1d_step,
        dict(x=R(B, D), weight=R(D, W), bias=R(D), activation="silu"),
        (D, W - 1),
    ),
    "causal_conv1d_step, as many slots as taps": (
        causal_conv1d_step,
        dict(x=R(B, D), weight=R(D, W), bias=R(D), activation="silu"),
        (D, W),
    ),
    "causal_conv1d_step, many slots and taps": (
        causal_conv1d_step,
        dict(x=R(B, D), weight=R(D, 19), bias=R(D), activation=None),
        (D, 37),
    ),
    "causal_conv1d_step, circular": (
        causal_conv1d_step,
        dict(x=R(B, D), weight=R(D, W), bias=R(D), activation=None, positions=torch.tensor([0, 12, 8])),
        (D, 5),
    ),
}


def by_backends(ops: dict) -> list:
    """Each op on each of its backends. Triton's interpreter takes seconds for many taps."""
    return [
        pytest.param(name, backend, id=f"{name} by {backend}")
        for name, (op, *_) in ops.items()
        for backend in TABLES[op.__name__]
        if (backend, name) != ("triton", "causal_conv1d_step, many slots and taps")
    ]


def layers_apart(x):
    """As one layer of a cache of three."""
    return torch.stack([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], 1)[:, 1]


LAYOUTS = {f.__name__: f for f in (torch.clone, transposed, spaced, layers_apart)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, backend", by_backends(STEPS))
def test_a_state_of_any_dtype_and_strides_is_advanced_in_place(name, backend, dtype, tensor_cores):
    op, token, shape = STEPS[name]
    op, state = able(op, backend), R(B, *shape).to(dtype)
    dense = state.to(torch.float32, copy=True)
    y = op(**token, state=dense)
    for layout in LAYOUTS.values() if backend != "triton" else (transposed, spaced):
        there = layout(state)
        assert_close(op(**token, state=there), y)
        # float32's own roundings may tip one of 16 bits
        assert_close(there, dense.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert (there == dense.to(dtype)).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indices", [(4, 0, 2), (-1, 3, -1), (-1, -1, -1)], ids=str)
@pytest.mark.parametrize("name, backend", by_backends(STEPS))
def test_indices_choose_states_and_no_other_is_touched(name, backend, indices, dtype, tensor_cores):
    if backend == "triton" and GPU == "cpu" and (indices[0] == 4 or dtype == torch.float32):
        pytest.skip("its interpreter takes seconds")
    op, token, shape = STEPS[name]
    op, states = able(op, backend), R(5, *shape).to(dtype)
    used = [b for b, i in enumerate(indices) if i >= 0]
    rows = [indices[b] for b in used]
    want, y = states.clone(), torch.zeros_like(token["v"] if "v" in token else token["x"])
    if used:
        own = {key: x[used] if is_of_tokens(key, x) else x for key, x in token.items()}
        chosen = states[rows]
        y[used] = op(**own, state=chosen)
        want[rows] = chosen
    for layout, integers in ((torch.clone, torch.int32), (transposed, torch.int64)):
        there = layout(states)
        got = op(**token, state=there, state_indices=torch.tensor(indices, dtype=integers))
        assert_close(got, y)
        assert_close(there, want, rtol=torch.finfo(dtype).eps, atol=1e-5)
        unused = [i for i in range(5) if i not in rows]
        assert torch.equal(there[unused], states[unused])
        assert not got[[b for b in range(B) if b not in used]].any()


def is_of_tokens(key, x):
    return isinstance(x, torch.Tensor) and key not in ("a", "d", "dt_bias", "weight", "bias")


@pytest.mark.parametrize("slots, integers", [(W - 1, torch.int32), (7, torch.int64)], ids=str)
@pytest.mark.parametrize("backend", TABLES["causal_conv1d_step"])
def test_decoding_on_a_circular_state_equals_the_whole_sequence(backend, integers, slots):
    """From any token on; the rows at different ones."""
    step, first = able(causal_conv1d_step, backend), torch.tensor([0, 5])
    whole = dict(x=R(2, 9, D), weight=R(D, W), bias=R(D), initial_state=R(2, D, W - 1))

    def by_steps(x, weight, bias, initial_state, activation):
        state = torch.full((2, D, slots), 7.0)
        past = (first[:, None] + torch.arange(1 - W, 0)) % slots
        state.scatter_(2, past[:, None].expand(2, D, W - 1), initial_state)
        options = dict(state=state, activation=activation)
        numbers = [(first + t).to(integers) for t in range(x.shape[1])]
        tokens = zip(x.unbind(1), numbers)
        return torch.stack([step(x_t, weight, bias, positions=n, **options) for x_t, n in tokens], 1)

    assert_agrees(by_steps, conv_reference, **whole, activation="silu")


@pytest.mark.parametrize("W, slots", [(1, 0), (1, 3), (2, 2), (4, 6), (6, 20)])
@pytest.mark.parametrize("backend", TABLES["causal_conv1d_step"])
def test_more_slots_than_taps_keep_more_tokens(backend, W, slots):
    step = able(causal_conv1d_step, backend)
    x, weight, state = R(2, 5, D), R(D, W), R(2, D, slots)
    tokens = torch.cat([state, x.mT], -1)[..., -slots:] if slots else state.clone()
    whole = conv_reference(x, weight, initial_state=state[..., slots - (W - 1) :].clone())
    assert_close(torch.stack([step(x_t, weight, state=state) for x_t in x.unbind(1)], 1), whole)
    assert torch.equal(state, tokens)


@pytest.mark.parametrize("backend", TABLES["retention_step"])
def test_a_step_on_a_transposed_state_is_as_exact_as_the_reference(backend):
    """Mamba-2's [B, H, P, N], as its other implementations keep it, of more rows than a vector has."""
    step = able(retention_step, backend)
    whole = dict(q=R(2, 1, 1, 150), k=R(2, 1, 1, 150), v=R(2, 1, 3, 20), log_decay=-torch.rand(2, 1, 3))
    whole |= dict(initial_state=R(2, 3, 150, 20))

    def one_token(q, k, v, log_decay, initial_state, return_final_state):
        state = transposed(initial_state)
        return step(*(u[:, 0] for u in (q, k, v, log_decay)), state=state)[:, None], state

    assert_agrees(one_token, retention_reference, **whole, return_final_state=True)


@pytest.mark.parametrize("backend", TABLES["retention_step"])
def test_without_a_decay_nothing_fades(backend):
    step = able(retention_step, backend)
    q, k, v, state = R(2, H, K), R(2, H, K), R(2, H, V), R(2, H, K, V)
    twin = state.clone()
    assert torch.equal(step(q, k, v, None, state=state), step(q, k, v, torch.zeros(H), state=twin))
    assert torch.equal(state, twin)


@pytest.mark.parametrize("backend", TABLES["retention"])
def test_without_a_decay_retention_is_linear_attention(backend):
    inputs = dict(q=R(2, 9, 2, K), k=R(2, 9, 1, K), v=R(2, 9, 2, 3), initial_state=R(2, 2, K, 3))
    inputs = {name: x.requires_grad_() for name, x in inputs.items()} | dict(log_decay=None)
    assert_agrees(able(retention, backend), retention_reference, **inputs, return_final_state=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_float64_takes_states_of_less(name, dtype):
    op, token, shape = STEPS[name]
    token = {
        key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in token.items()
    }
    state = R(B, *shape).to(dtype)
    exact = state.to(torch.float64, copy=True)
    assert torch.equal(op(**token, state=state), op(**token, state=exact))
    assert torch.equal(state, exact.to(dtype))


SEQUENCES = {
    "retention": (
        retention,
        retention_reference,
        dict(q=R(1, 9, 2, K), k=R(1, 9, 2, K), v=R(1, 9, 2, V), log_decay=-torch.rand(1, 9, 2)),
        (2, K, V),
    ),
    "selective_scan": (
        selective_scan,
        scan_reference,
        dict(x=R(1, 9, D), dt=torch.rand(1, 9, D), a=-torch.rand(D, N), b=R(1, 9, N), c=R(1, 9, N)),
        (D, N),
    ),
    "causal_conv1d": (causal_conv1d, conv_reference, dict(x=R(1, 9, D), weight=R(D, W)), (D, W - 1)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, backend", by_backends(SEQUENCES))
def test_an_initial_state_of_16_bits_has_a_gradient_of_16_bits(name, backend, dtype):
    if backend == "triton" and GPU == "cpu" and dtype == torch.float16:
        pytest.skip("its interpreter takes seconds")
    op, reference, inputs, shape = SEQUENCES[name]
    state = R(2, *shape).to(dtype).requires_grad_()
    bounds = torch.tensor([0, 4, 9], dtype=torch.int64)
    whole = inputs | dict(initial_state=state, cu_seqlens=bounds, return_final_state=True)
    assert_agrees(able(op, backend), reference, **whole)


@pytest.mark.parametrize("name", SEQUENCES)
def test_float64_takes_initial_states_of_less(name):
    op, _, inputs, shape = SEQUENCES[name]
    inputs = {key: x.double() for key, x in inputs.items()}
    state = R(1, *shape)
    out = op(**inputs, initial_state=state, return_final_state=True)
    assert_close(out, op(**inputs, initial_state=state.double(), return_final_state=True))
    assert [x.dtype for x in out] == [torch.float64] * 2


@pytest.mark.parametrize("name, backend", by_backends(SEQUENCES))
def test_cu_seqlens_of_64_bits_are_those_of_32(name, backend):
    op, _, inputs, _ = SEQUENCES[name]
    op = able(op, backend)
    bounds = torch.tensor([0, 0, 4, 9])
    want = op(**inputs, cu_seqlens=bounds.int(), return_final_state=True)
    assert_close(op(**inputs, cu_seqlens=bounds, return_final_state=True), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", SEQUENCES)
def test_64_bits_and_16_bit_states_compile_into_one_graph(name):
    op, _, inputs, shape = SEQUENCES[name]

    def run(inputs, state, bounds):
        y, final = op(**inputs, initial_state=state, cu_seqlens=bounds, return_final_state=True)
        return y.sum() + final.square().sum()

    torch.compiler.reset()
    state = R(2, *shape).bfloat16().requires_grad_()
    arguments = inputs, state, torch.tensor([0, 4, 9])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (got,), (want,) = (torch.autograd.grad(f(*arguments), state) for f in (compiled, run))
    assert torch.equal(got, want) and got.dtype == torch.bfloat16


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_some_states_compiles_into_one_graph(name):
    """As transformers' generate() has them: views of a cache, some of 16 bits."""
    op, token, shape = STEPS[name]
    indices = torch.tensor([3, -1, 0])

    def run(token, states, indices):
        return op(**token, state=states.mT, state_indices=indices)

    torch.compiler.reset()
    states = R(5, *shape).mT.bfloat16().contiguous()
    twin = states.clone()
    y = run(token, twin, indices)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close((compiled(token, states, indices), states), (y, twin))


@pytest.mark.parametrize("name, backend", by_backends(STEPS))
def test_where_nobody_may_look_at_indices_one_of_no_state_gives_nan_and_touches_none(
    name, backend, monkeypatch
):
    """A GPU would have to be waited for."""
    if backend == "cpp":
        pytest.skip("csrc looks")
    op, token, shape = STEPS[name]
    op, states = able(op, backend), R(5, *shape)
    monkeypatch.setattr("lcikernels.ops.checks.in_range", lambda *_: None)
    got = states.clone()
    y = op(**token, state=got, state_indices=torch.tensor([5, 2, 9]))
    assert y[[0, 2]].isnan().all() and y[1].isfinite().all()
    assert torch.equal(got[[0, 1, 3, 4]], states[[0, 1, 3, 4]])
