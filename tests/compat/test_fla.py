"""fla's functions, argument by argument, against the recurrence that they are published with."""

import inspect
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from devices import multiplied
from shapes import PACKED
from tolerance import assert_agrees
from torch import Tensor

from lcikernels.compat import fla
from lcikernels.compat.serving import TABLE

# flash-linear-attention 0.6.0
PUBLISHED = {
    "chunk_retention": "q k v scale initial_state output_final_state cu_seqlens",
    "fused_chunk_retention": "q k v scale initial_state output_final_state cu_seqlens",
    "fused_recurrent_retention": "q k v scale initial_state output_final_state reverse state_v_first"
    " cu_seqlens",
    "parallel_retention": "q k v scale output_attentions cu_seqlens",
    "chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state state_v_first cu_seqlens"
    " cu_seqlens_cpu",
    "fused_chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state cu_seqlens",
    "fused_recurrent_simple_gla": "q k v g g_gamma scale initial_state output_final_state reverse"
    " state_v_first cu_seqlens",
    "parallel_simple_gla": "q k v g scale output_attentions cu_seqlens cu_seqlens_cpu",
}
FUNCTIONS = [getattr(fla, name) for name in PUBLISHED]
B, T, H, K, V = 2, 35, 3, 5, 6


def takes(function: Callable, *arguments: str) -> bool:
    return set(arguments) <= inspect.signature(function).parameters.keys()


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Token by token, in the dtype of the inputs."""
    if cu_seqlens is not None:
        parts = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            cut = (x if x is None else x[:, start:end] for x in (q, k, v, g))
            state = None if initial_state is None else initial_state[n : n + 1]
            parts.append(recurrence(*cut, g_gamma, scale, state, True, reverse, state_v_first))
        o, state = (torch.cat(x, dim) for dim, x in zip((1, 0), zip(*parts)))
        return (o, state) if output_final_state else o

    S = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    S = S.mT if initial_state is not None and state_v_first else S
    tokens = range(q.shape[1])
    out = [v[:, t] for t in tokens]
    for t in reversed(tokens) if reverse else tokens:
        if g is not None:
            S = S * g[:, t, :, None, None].exp()
        if g_gamma is not None:
            S = S * g_gamma[:, None, None].exp()
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[t] = (q[:, t, :, :, None] * S).sum(-2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    o = torch.stack(out, 1) if out else v
    return (o, S.mT if state_v_first else S) if output_final_state else o


def retnet(q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence with RetNet's decays."""
    decays = [math.log(1 - 2.0 ** (-5 - h)) for h in range(q.shape[2])]
    return recurrence(q, k, v, g_gamma=q.new_tensor(decays), **arguments)


def reference(function: Callable) -> Callable:
    return retnet if function.__name__.endswith("retention") else recurrence


def given(function: Callable) -> Callable:
    """What the function returns that is not None."""

    def run(**arguments: object) -> tuple[Tensor, ...]:
        pair = function(**arguments)
        assert isinstance(pair, tuple) and len(pair) == 2
        return tuple(x for x in pair if x is not None)

    return run


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def rates(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (-0.2 * torch.rand(shape)).to(dtype).requires_grad_()


def inputs(rows: int = B, tokens: int = T, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "q": leaf(rows, tokens, H, K, dtype=dtype),
        "k": leaf(rows, tokens, H, K, dtype=dtype),
        "v": leaf(rows, tokens, H, V, dtype=dtype),
    }


def states(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    return {"initial_state": leaf(B, H, K, V, dtype=dtype), "output_final_state": True}


ARGUMENTS = {
    "q, k, v alone": dict,
    "scale": lambda: {"scale": 0.37},
    "output_final_state": lambda: {"output_final_state": True},
    "initial_state": lambda: {"initial_state": leaf(B, H, K, V)},
    "both states": states,
    "both states, reverse": lambda: {**states(), "reverse": True},
    "state_v_first": lambda: {
        "initial_state": leaf(B, H, V, K),
        "output_final_state": True,
        "state_v_first": True,
    },
    "state_v_first, no initial state": lambda: {"output_final_state": True, "state_v_first": True},
    "g": lambda: {"g": rates(B, T, H)},
    "g_gamma": lambda: {"g_gamma": rates(H)},
    "g, g_gamma, both states": lambda: {"g": rates(B, T, H), "g_gamma": rates(H), **states()},
    "g, reverse": lambda: {"g": rates(B, T, H), "reverse": True},
    "g_gamma in 16 bits": lambda: {"g": rates(B, T, H), "g_gamma": rates(H, dtype=torch.bfloat16)},
}
SERVED = [
    pytest.param(function, arguments, id=f"{function.__name__}, {what}")
    for function in FUNCTIONS
    for what, arguments in ARGUMENTS.items()
    if takes(function, *arguments())
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=PUBLISHED)
def test_the_arguments_are_the_published_ones_in_their_order(function):
    parameters = inspect.signature(function).parameters.values()
    published = [x for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    assert [x.name for x in published] == PUBLISHED[function.__name__].split()
    assert all(x.default in (x.empty, None, False) for x in published)


def test_every_function_says_what_it_serves_argument_by_argument():
    assert sorted(TABLE["fla"]) == fla.__all__
    for name, rows in TABLE["fla"].items():
        assert list(rows) == list(inspect.signature(getattr(fla, name)).parameters)


@pytest.mark.parametrize("function, arguments", SERVED)
def test_outputs_and_gradients_are_as_exact_as_the_recurrence(function, arguments, poisoned):
    assert_agrees(given(function), reference(function), **inputs(), **arguments())


@pytest.mark.parametrize("bounds", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("function", FUNCTIONS, ids=PUBLISHED)
def test_packed_sequences_do_not_see_each_other(function, bounds, poisoned):
    whole = inputs(1, bounds[-1]) | {"cu_seqlens": torch.tensor(bounds)}
    if takes(function, "initial_state"):
        whole |= {"initial_state": leaf(len(bounds) - 1, H, K, V), "output_final_state": True}
    if takes(function, "g"):
        whole["g"] = rates(1, bounds[-1], H)
    assert_agrees(given(function), reference(function), **whole)
    if takes(function, "reverse"):
        whole |= {"reverse": True, "state_v_first": True, "initial_state": leaf(len(bounds) - 1, H, V, K)}
        assert_agrees(given(function), reference(function), **whole)


@pytest.mark.parametrize("function", FUNCTIONS, ids=PUBLISHED)
def test_sequences_may_be_told_in_32_bits(function):
    bounds, whole = torch.tensor([0, 11, T]), inputs(1)
    told = function(**whole, cu_seqlens=bounds.int())[0]
    assert torch.equal(told, function(**whole, cu_seqlens=bounds)[0])
    assert not torch.equal(told, function(**whole)[0])


# float16 runs in Triton's interpreter, where 9 tokens take 3 s.
IN_16_BITS = [(function, torch.bfloat16, T) for function in FUNCTIONS]
IN_16_BITS += [(fla.fused_recurrent_simple_gla, torch.float16, 3)]


@pytest.mark.parametrize("function, dtype, tokens", IN_16_BITS)
def test_16_bit_tensors_gates_and_states_are_computed_in_float32(function, dtype, tokens):
    """But for products of bfloat16 where the processor itself has them."""
    whole = inputs(tokens=tokens, dtype=dtype)
    if takes(function, "initial_state"):
        whole |= states(dtype)
    if takes(function, "g"):
        whole["g"] = rates(B, tokens, H, dtype=dtype)
    if takes(function, "g_gamma"):
        whole["g_gamma"] = rates(H, dtype=dtype)
    assert_agrees(given(function), reference(function), multiplied(dtype), **whole)


def test_the_output_has_the_dtype_of_q_where_tensors_have_several():
    whole = inputs() | {
        "q": leaf(B, T, H, K, dtype=torch.bfloat16),
        "v": leaf(B, T, H, V, dtype=torch.float16),
    }
    gates = {"g": rates(B, T, H), "g_gamma": rates(H, dtype=torch.float16)}
    assert_agrees(given(fla.chunk_simple_gla), recurrence, **whole, **gates, **states(torch.bfloat16))


def test_float64_is_computed_in_float64():
    whole = inputs(dtype=torch.float64) | {"g": rates(B, T, H, dtype=torch.float64)}
    assert_agrees(given(fla.fused_recurrent_simple_gla), recurrence, **whole, **states(torch.float64))


def explicit(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The weights as products of decays, row after row, and what they make of v."""
    rate = q.new_zeros(q.shape[:3]) if g is None else g
    fading, rows = q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), []
    for t in range(q.shape[1]):
        here = torch.zeros_like(fading)
        here[..., t] = 1
        fading = fading * rate[:, t, :, None].exp() + here
        rows.append(fading)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attn = torch.einsum("bthk,bshk->bhts", q, k) * torch.stack(rows, 2) * scale
    return torch.einsum("bhts,bshv->bthv", attn, v), attn


@pytest.mark.parametrize("gate", [None, 0.2, 5.0], ids=["no gate", "slow", "fast"])
def test_the_weights_of_a_parallel_form_have_gradients_too(gate):
    whole = inputs(tokens=150) | {"scale": 0.3, "output_attentions": True}
    if gate is not None:
        whole["g"] = (-gate * torch.rand(B, 150, H)).requires_grad_()

    def weighted(output_attentions, **arguments):
        return explicit(**arguments)

    assert_agrees(fla.parallel_simple_gla, weighted, **whole)


def test_the_weights_of_parallel_retention_are_those_of_retnets_decays():
    def weighted(q, k, v, output_attentions):
        decays = q.new_tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(H)])
        return explicit(q, k, v, decays.expand(q.shape[:3]))

    assert_agrees(fla.parallel_retention, weighted, **inputs(), output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_computed_in_float32_also_under_autocast(dtype):
    whole = inputs(tokens=4, dtype=dtype) | {"g": rates(B, 4, H, dtype=dtype)}
    v = whole.pop("v").detach()

    def alone(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return fla.parallel_simple_gla(**arguments, v=v, output_attentions=True)[1]

    assert_agrees(alone, lambda q, k, g: explicit(q, k, v.to(q.dtype), g)[1], **whole)


def test_a_gate_that_forgets_all_disturbs_no_other_weight():
    whole = inputs() | {"g": rates(B, T, H)}
    with torch.no_grad():
        whole["g"][:, 20] = whole["g"][:, 30, 1] = -torch.inf
    o, attn = fla.parallel_simple_gla(**whole, output_attentions=True)
    assert (attn[..., 20:, :20] == 0).all()
    assert_agrees(
        lambda **x: fla.parallel_simple_gla(**x, output_attentions=True)[0],
        lambda **x: explicit(**x)[0],
        **whole,
    )
    assert_agrees(
        lambda **x: fla.parallel_simple_gla(**x, output_attentions=True),
        explicit,
        **whole,
    )


@pytest.mark.parametrize("state_v_first", [False, True], ids=["[K, V]", "[V, K]"])
def test_decoding_token_by_token_equals_the_whole_and_leaves_the_callers_states_alone(state_v_first):
    whole = {name: x.detach() for name, x in inputs(tokens=9).items()} | {
        "g": rates(B, 9, H).detach(),
        "initial_state": torch.randn(B, H, V, K) if state_v_first else torch.randn(B, H, K, V),
    }

    def by_tokens(initial_state, **tokens):
        state, out = initial_state, []
        for t in range(9):
            before = state.clone()
            token = {name: x[:, t : t + 1] for name, x in tokens.items()}
            o, after = fla.fused_recurrent_simple_gla(
                **token, initial_state=state, output_final_state=True, state_v_first=state_v_first
            )
            assert torch.equal(state, before)
            state, out = after, [*out, o]
        return torch.cat(out, 1), state

    def at_once(**arguments):
        return recurrence(**arguments, output_final_state=True, state_v_first=state_v_first)

    with torch.no_grad():
        assert_agrees(by_tokens, at_once, **whole)


FREE = [
    (fla.chunk_retention, {"chunk_size": 16}),
    (fla.chunk_simple_gla, {"chunk_size": 16}),
    (fla.chunk_simple_gla, {"cu_seqlens_cpu": torch.tensor([0, 11, T])}),
    (fla.parallel_simple_gla, {"cu_seqlens_cpu": torch.tensor([0, 11, T])}),
]


@pytest.mark.parametrize("function, argument", FREE)
def test_how_fla_computes_changes_no_result(function, argument):
    whole = inputs(1) | {"cu_seqlens": torch.tensor([0, 11, T])}
    assert torch.equal(function(**whole)[0], function(**whole, **argument)[0])


@pytest.mark.parametrize("function", [fla.fused_recurrent_retention, fla.fused_recurrent_simple_gla])
def test_a_state_may_be_turned_by_its_old_name_with_a_warning(function):
    whole = inputs() | {"initial_state": leaf(B, H, V, K), "output_final_state": True}
    new = function(**whole, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="state_v_first is its name") as warned:
        old = function(**whole, transpose_state_layout=True)
    assert warned[0].filename == __file__
    assert all(map(torch.equal, old, new))


def test_all_functions_compile_into_one_graph_with_gradients():
    torch.compiler.reset()
    tokens, state, g, g_gamma = inputs(1), leaf(2, H, K, V), rates(1, T, H), rates(H)
    calls = []
    for function in FUNCTIONS:
        fixed = {"cu_seqlens": torch.tensor([0, 11, T])} if takes(function, "initial_state") else {}
        fixed |= dict.fromkeys(("output_final_state", "output_attentions", "reverse"), True)
        calls.append((function, {name: x for name, x in fixed.items() if takes(function, name)}))

    def loss(q, k, v, initial_state, g, g_gamma):
        gates = {"initial_state": initial_state, "g": g, "g_gamma": g_gamma}
        total = 0
        for function, fixed in calls:
            given = {name: x for name, x in gates.items() if takes(function, name)}
            total = total + sum(x.square().sum() for x in function(q, k, v, **given, **fixed))
        return total

    leaves = (*tokens.values(), state, g, g_gamma)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(got, want)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 4, 3, 5), dtype=dtype)


BOUNDS = torch.tensor([0, 4])
REFUSALS = {
    "heads before tokens": (
        lambda: fla.chunk_retention(x(), x(), x(), head_first=True),
        "chunk_retention: head_first must be False (fla has removed it: tensors are [B, T, H, ...]),"
        " got True",
    ),
    "heads before tokens in GLA": (
        lambda: fla.chunk_simple_gla(x(), x(), x(), head_first=True),
        "chunk_simple_gla: head_first must be False (fla has removed it: tensors are [B, T, H, ...]),"
        " got True",
    ),
    "shared keys": (
        lambda: fla.fused_chunk_retention(x(), x(2, 4, 1, 5), x()),
        "fused_chunk_retention: k must be [B, T, H, K] with H=3, got 1 on axis 2 of shape (2, 4, 1, 5)",
    ),
    "a matrix for q": (
        lambda: fla.parallel_retention(x(4, 5), x(), x()),
        "parallel_retention: q must be [B, T, H, K], got 2 axes: shape (4, 5)",
    ),
    "other tokens": (
        lambda: fla.parallel_simple_gla(x(), x(), x(2, 3, 3, 5)),
        "parallel_simple_gla: v must be [B, T, H, V] with T=4, got 3 on axis 1 of shape (2, 3, 3, 5)",
    ),
    "a gate per channel": (
        lambda: fla.chunk_simple_gla(x(), x(), x(), x()),
        "chunk_simple_gla: g must be [B, T, H], got 4 axes: shape (2, 4, 3, 5)",
    ),
    "a decay for other heads": (
        lambda: fla.fused_chunk_simple_gla(x(), x(), x(), g_gamma=x(2)),
        "fused_chunk_simple_gla: g_gamma must be [H] with H=3, got 2 on axis 0 of shape (2,)",
    ),
    "integers": (
        lambda: fla.fused_recurrent_simple_gla(x(), x(dtype=torch.int64), x()),
        "fused_recurrent_simple_gla: k must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "another device": (
        lambda: fla.chunk_simple_gla(x(), x(), x(), x(2, 4, 3).to("meta")),
        "chunk_simple_gla: g must be on cpu like the other arguments, got meta",
    ),
    "a state for other rows": (
        lambda: fla.chunk_retention(x(), x(), x(), initial_state=x(3, 3, 5, 5)),
        "chunk_retention: initial_state must be [B, H, K, V] with B=2, got 3 on axis 0 of shape (3, 3, 5, 5)",
    ),
    "a state for other sequences": (
        lambda: fla.chunk_retention(*[x(1, 4, 3, 5)] * 3, None, x(2, 3, 5, 5), cu_seqlens=BOUNDS),
        "chunk_retention: initial_state must be [N, H, K, V] with N=1, got 2 on axis 0 of shape (2, 3, 5, 5)",
    ),
    "a state that is turned": (
        lambda: fla.fused_recurrent_retention(
            x(), x(), x(2, 4, 3, 6), initial_state=x(2, 3, 5, 6), state_v_first=True
        ),
        "fused_recurrent_retention: initial_state must be [B, H, V, K] with V=6, got 5 on axis 2 of shape"
        " (2, 3, 5, 6)",
    ),
    "two rows of packed sequences": (
        lambda: fla.fused_recurrent_simple_gla(x(), x(), x(), cu_seqlens=BOUNDS),
        "fused_recurrent_simple_gla: cu_seqlens must be given only with B=1 (packed sequences share one row),"
        " got B=2",
    ),
    "weights of packed sequences": (
        lambda: fla.parallel_retention(*[x(1, 4, 3, 5)] * 3, output_attentions=True, cu_seqlens=BOUNDS),
        "parallel_retention: output_attentions must be False with cu_seqlens, got True",
    ),
    "both names of a layout": (
        lambda: fla.fused_recurrent_simple_gla(
            x(), x(), x(), state_v_first=True, transpose_state_layout=True
        ),
        "fused_recurrent_simple_gla: transpose_state_layout must be left out where state_v_first is given,"
        " got both",
    ),
}


@pytest.mark.parametrize("call, message", REFUSALS.values(), ids=REFUSALS)
def test_a_call_that_does_not_fit_is_refused_by_function_and_argument(call, message):
    with pytest.raises(ValueError) as refusal:
        call()
    assert str(refusal.value) == message


@pytest.mark.parametrize("function", FUNCTIONS, ids=PUBLISHED)
def test_nothing_that_is_no_argument_is_swallowed(function):
    with pytest.raises(TypeError, match="unexpected keyword argument 'offsets'"):
        function(x(), x(), x(), offsets=BOUNDS)
