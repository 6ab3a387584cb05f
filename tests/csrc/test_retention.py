"""The compiled retention on every instruction set: what the shapes of tests/ops do not reach."""

from contextlib import contextmanager

import pytest
import torch
from tolerance import assert_agrees

from lcikernels import retention, retention_step
from lcikernels.ops.retention.reference import retention as reference

OPS = torch.ops.lcikernels_cpp

# B, T, Hq, Hk, Hv, K, V
SHAPES = {
    "K = V = 96": (1, 70, 2, 2, 2, 96, 96),
    "one feature, one value": (2, 40, 2, 2, 2, 1, 1),
    "a vector and one": (1, 33, 2, 2, 2, 17, 33),
    "two tiles and one": (1, 65, 1, 1, 1, 29, 15),
    "V in parts": (1, 100, 1, 1, 1, 16, 200),
    "V in parts, q and k shared": (1, 40, 1, 1, 2, 8, 96),
    "K is 512": (1, 34, 1, 1, 1, 512, 8),
    "V is 512": (1, 34, 1, 1, 1, 8, 512),
    "one pair of q and k for 24 heads": (1, 40, 1, 1, 24, 8, 8),
    "12 heads share q and k": (2, 70, 1, 1, 12, 8, 8),
    "12 heads share q, V in parts": (1, 70, 1, 12, 12, 8, 64),
    "states of a group fill its memory": (16, 33, 1, 1, 6, 128, 96),
    "three heads share q, two share k": (2, 40, 2, 3, 6, 8, 8),
    "four heads share v": (2, 40, 8, 8, 2, 8, 8),
    "several runs of kept states": (1, 650, 1, 1, 1, 4, 4),
}


def inputs(B, T, Hq, Hk, Hv, K, V, *, per_token, dtype=torch.float32):
    H = max(Hq, Hk, Hv)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": torch.randn(B, T, Hq, K, dtype=dtype, requires_grad=True),
        "k": torch.randn(B, T, Hk, K, dtype=dtype, requires_grad=True),
        "v": torch.randn(B, T, Hv, V, dtype=dtype, requires_grad=True),
        "log_decay": (-0.2 * torch.rand((B, T, H) if per_token else H, dtype=exact)).requires_grad_(),
        "initial_state": torch.randn(B, H, K, V, dtype=exact, requires_grad=True),
        "return_final_state": True,
    }


def compiled(*tokens, **arguments):
    return retention(*tokens, **arguments, backend="cpp")


def run(arguments):
    """Outputs, and the gradients from random cotangents."""
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = compiled(**arguments)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, cotangents)]


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_to_cut_the_work_is_as_exact_as_the_reference(instruction_set, shape, per_token, poisoned):
    assert_agrees(compiled, reference, **inputs(*shape, per_token=per_token))


@pytest.mark.parametrize(
    "shape",
    ["V in parts, q and k shared", "four heads share v", "12 heads share q and k", "a vector and one"],
)
def test_bfloat16_is_computed_and_summed_in_float32(instruction_set, shape, poisoned):
    assert_agrees(compiled, reference, **inputs(*SHAPES[shape], per_token=True, dtype=torch.bfloat16))


def test_float64_is_exact_to_float64(instruction_set):
    arguments = inputs(1, 70, 2, 1, 2, 19, 7, per_token=True, dtype=torch.float64)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    got, want = (
        torch.autograd.grad(sum(x.sum() for x in op(**arguments)), leaves) for op in (compiled, reference)
    )
    for x, y in zip(got, want):
        assert (x - y).abs().max() <= 1e-13 * y.abs().max()


@pytest.mark.parametrize("shared", [8, 1], ids=["heads of their own", "q and k shared"])
def test_packed_sequences_and_rows_of_a_batch_have_the_same_bits(instruction_set, shared):
    rows = inputs(3, 45, shared, shared, 8, 5, 9, per_token=True)
    packed = {
        name: x.detach().reshape(1, -1, *x.shape[2:]).requires_grad_() if x.shape[:2] == (3, 45) else x
        for name, x in rows.items()
        if isinstance(x, torch.Tensor)
    }
    bounds = torch.tensor([0, 45, 90, 135], dtype=torch.int32)
    packed |= {"return_final_state": True, "cu_seqlens": bounds}
    for x, y in zip(run(rows), run(packed)):
        assert torch.equal(x.flatten(), y.flatten())


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", ["V in parts, q and k shared", "12 heads share q and k"])
@pytest.mark.parametrize("learned_rates", [False, True])
def test_the_number_of_threads_changes_no_bit(instruction_set, shape, learned_rates):
    """Nor does the number of tasks: with more threads than cores there are more."""
    B, T, Hq, Hk, Hv, K, V = SHAPES[shape]
    arguments = inputs(B, 300, Hq, Hk, Hv, K, V, per_token=True)  # work enough for two threads
    arguments["log_decay"].requires_grad_(learned_rates)
    results = []
    for count in (1, 2, 16):
        with threads(count):
            results.append(run(arguments))
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others))


# B, Hq, H, V: the tasks of the forward pass on 1, 16 and 64 threads, of the backward with and without rates
TASKS = {
    "RetNet": ((2, 4, 4, 256), (8, 16, 64), (8, 16)),
    "RetNet, a batch of 8 with 8 heads": ((8, 8, 8, 256), (64, 64, 64), (64, 128)),
    "Mamba-2": ((1, 1, 24, 64), (3, 12, 48), (8, 16)),
    "Mamba-2, a batch of 8": ((8, 1, 24, 64), (24, 32, 64), (16, 32)),
}


@pytest.mark.parametrize("shape, forward, backward", TASKS.values(), ids=TASKS)
def test_there_are_tasks_for_many_cores(shape, forward, backward):
    B, Hq, H, V = shape
    q, v, log_decay = torch.empty(B, 1, Hq, 8), torch.empty(B, 1, H, V), torch.empty(H)
    for count, want in zip((1, 16, 64), forward):
        with threads(count):
            assert OPS.retention_tasks(q, q, v, log_decay) == (want, *backward)


@pytest.mark.parametrize("where", ["q", "k", "v", "log_decay", "initial_state"])
def test_a_nan_stays_in_its_sequence_and_head(instruction_set, where):
    assert_a_nan_stays(inputs(2, 70, 2, 2, 2, 5, 70, per_token=True), where)


def assert_a_nan_stays(clean, where):
    """Of the first sequence and head of two each."""
    dirty = clean | {
        name: x.detach().clone().requires_grad_() for name, x in clean.items() if isinstance(x, torch.Tensor)
    }
    with torch.no_grad():
        head = dirty[where][0, 0] if where == "initial_state" else dirty[where][0, 33, 0]
        head.fill_(torch.nan)
    got, want = run(dirty), run(clean)
    assert got[0][0, :, 0].isnan().any()
    for x, y in zip(got, want):
        heads = 1 if x.shape[1] == 2 else 2  # [B, H, K, V] or [B, T, H, ...]
        x, y = x.movedim(heads, 1), y.movedim(heads, 1)
        assert torch.equal(x[1], y[1])
        assert torch.equal(x[0, 1], y[0, 1])


def test_a_state_in_any_layout_is_updated_in_place(instruction_set):
    state = torch.randn(2, 3, 40, 5).mT
    twin = state.contiguous()
    token = torch.randn(2, 1, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 40), -torch.rand(2, 3)
    o = retention_step(*token, state=state, backend="cpp")
    torch.testing.assert_close(o, retention_step(*token, state=twin, backend="cpp"))
    assert torch.equal(state, twin)


def spread(x):
    """The same numbers, in memory of which they are every second element but along the last axis."""
    wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2, :] = x
    return wide[..., ::2, :]


def test_heads_and_rates_are_read_where_they_lie(instruction_set):
    q, k, v = torch.randn(2, 40, 2, 5), torch.randn(2, 40, 1, 5), torch.randn(2, 40, 2, 7)
    rates = -torch.rand(2, 40, 2)
    views = [*map(spread, (q, k, v)), spread(rates.mT).mT]
    grad_o = torch.randn(2, 40, 2, 7)
    arguments, tail = (q, k, v, rates), (0.5, None, None)
    assert torch.equal(OPS.retention_forward(*views, *tail)[0], OPS.retention_forward(*arguments, *tail)[0])
    got = OPS.retention_backward(spread(grad_o), None, *views, *tail, True)
    want = OPS.retention_backward(grad_o, None, *arguments, *tail, True)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    added = OPS.retention_crossing(views[1], views[2], views[3], 1.0, False)
    assert torch.equal(added, OPS.retention_crossing(k, v, rates, 1.0, False))
    state = torch.randn(2, 2, 5, 7)
    states = state, state.clone()
    tokens = [[x[:, 3] for x in side] for side in (views, arguments)]
    got, want = (OPS.retention_step(*side, state, 0.5, None) for side, state in zip(tokens, states))
    assert torch.equal(got, want) and torch.equal(*states)
