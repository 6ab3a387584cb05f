"""The compiled retention on every instruction set: what the shapes of tests/ops do not reach."""

import pytest
import torch
from tolerance import assert_agrees

from lcikernels import retention, retention_step
from lcikernels.ops.retention.reference import retention as reference

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


@pytest.mark.parametrize("shape", ["V in parts, q and k shared", "four heads share v", "a vector and one"])
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


def test_packed_sequences_and_rows_of_a_batch_have_the_same_bits(instruction_set):
    rows = inputs(3, 45, 8, 8, 8, 5, 9, per_token=True)
    packed = {
        name: x.detach().reshape(1, -1, *x.shape[2:]).requires_grad_() if x.shape[:2] == (3, 45) else x
        for name, x in rows.items()
        if isinstance(x, torch.Tensor)
    }
    bounds = torch.tensor([0, 45, 90, 135], dtype=torch.int32)
    packed |= {"return_final_state": True, "cu_seqlens": bounds}
    for x, y in zip(run(rows), run(packed)):
        assert torch.equal(x.flatten(), y.flatten())


@pytest.mark.parametrize("shape", ["V in parts, q and k shared", "three heads share q, two share k"])
def test_the_number_of_threads_changes_no_bit(instruction_set, shape):
    B, T, Hq, Hk, Hv, K, V = SHAPES[shape]
    arguments = inputs(B, 300, Hq, Hk, Hv, K, V, per_token=True)  # work enough for two threads
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


OPS = torch.ops.lcikernels_cpp
R = torch.randn
GOOD = {
    "q": R(2, 5, 2, 4),
    "k": R(2, 5, 1, 4),
    "v": R(2, 5, 2, 3),
    "log_decay": -torch.rand(2),
    "scale": 0.5,
    "initial_state": R(2, 2, 4, 3),
    "cu_seqlens": None,
}
BAD = {
    "q must be [B, T, Hq, K]": {"q": R(2, 5, 4)},
    "q must be Float, Double or BFloat16, got Half": {"q": R(2, 5, 2, 4).half()},
    "k must be [B, T, Hk, K]": {"k": R(2, 5, 4)},
    "k must be [B, T, Hk, K] with K=4, got 6": {"k": R(2, 5, 1, 6)},
    "k must be Float, got Double": {"k": R(2, 5, 1, 4).double()},
    "v must be [B, T, Hv, V] with T=5, got 6": {"v": R(2, 6, 2, 3)},
    "v must be [B, T, Hv, V] with V at least 1": {"v": R(2, 5, 2, 0)},
    "v must be contiguous": {"v": R(2, 5, 3, 2).mT},
    "q must be such that its heads divide 3": {"v": R(2, 5, 3, 3), "initial_state": None},
    "log_decay must be [H] with H=2, got 3": {"log_decay": -torch.rand(3)},
    "log_decay must be [B, T, H]": {"log_decay": -torch.rand(2, 2)},
    "log_decay must be Float": {"log_decay": -torch.rand(2).double()},
    "initial_state must be [N, H, K, V] with V=3, got 4": {"initial_state": R(2, 2, 4, 4)},
    "cu_seqlens must be given only with B=1": {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
}


@pytest.mark.parametrize("sentence, wrong", BAD.items(), ids=BAD)
def test_the_library_itself_refuses_what_does_not_fit(instruction_set, sentence, wrong):
    with pytest.raises(RuntimeError) as refusal:
        OPS.retention_forward(*(GOOD | wrong).values())
    assert str(refusal.value).startswith(f"retention: {sentence}")


@pytest.mark.parametrize("bounds", [(0, 4), (1, 5), (0, 3, 2, 5)])
def test_the_library_itself_refuses_boundaries_out_of_order(instruction_set, bounds):
    one = {name: x[:1] if name in {"q", "k", "v"} else x for name, x in GOOD.items()}
    one |= {"initial_state": None, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="retention: cu_seqlens must be 0 first, T=5 last and never"):
        OPS.retention_forward(*one.values())


def test_the_library_itself_refuses_gradients_and_states_of_another_shape(instruction_set):
    for grad_o, grad_state, sentence in (
        (R(2, 5, 2, 4), None, r"grad_o must be \[B, T, H, V\] with V=3"),
        (R(2, 5, 2, 3), R(1, 2, 4, 3), r"dfinal_state must be \[N, H, K, V\] with N=2"),
    ):
        with pytest.raises(RuntimeError, match=f"retention: {sentence}"):
            OPS.retention_backward(grad_o, grad_state, *GOOD.values(), False)
    with pytest.raises(RuntimeError, match=r"retention_step: state must be \[B, H, K, V\] with K=4, got 3"):
        OPS.retention_step(R(2, 2, 4), R(2, 1, 4), R(2, 2, 3), -torch.rand(2), R(2, 2, 3, 3), 0.5, None)
