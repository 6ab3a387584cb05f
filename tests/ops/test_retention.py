from importlib import import_module

import pytest
import torch
from devices import GPU, multiplied, on_device, why_not
from shapes import PACKED, RETENTION
from tolerance import assert_agrees

from lcikernels import retention, retention_step
from lcikernels.backends import TABLES
from lcikernels.ops.retention.reference import retention as reference


def inputs(B, T, Hq, Hk, Hv, K, V, *, per_token=False, N=None, dtype=torch.float32):
    H = max(Hq, Hk, Hv)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": torch.randn(B, T, Hq, K, dtype=dtype, requires_grad=True),
        "k": torch.randn(B, T, Hk, K, dtype=dtype, requires_grad=True),
        "v": torch.randn(B, T, Hv, V, dtype=dtype, requires_grad=True),
        "log_decay": (-0.2 * torch.rand((B, T, H) if per_token else H, dtype=exact)).requires_grad_(),
        "initial_state": torch.randn(N or B, H, K, V, dtype=exact, requires_grad=True),
        "return_final_state": True,
    }


@pytest.fixture(params=TABLES["retention"])
def retain(request, monkeypatch):
    """The op on each backend; for Triton's interpreter in chunks of 32 tokens, half the time of 16."""
    if why := why_not("retention", request.param):
        pytest.skip(why)
    if request.param == "triton" and GPU == "cpu":
        monkeypatch.setattr(import_module("lcikernels.ops.retention.launch"), "chunk", lambda *_: 32)
    return on_device(retention, request.param)


@pytest.fixture(params=TABLES["retention_step"])
def step(request):
    """One token on each backend."""
    if why := why_not("retention_step", request.param):
        pytest.skip(why)
    return on_device(retention_step, request.param)


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
@pytest.mark.parametrize("shape", RETENTION.values(), ids=RETENTION)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(retain, shape, per_token, poisoned):
    assert_agrees(retain, reference, **inputs(*shape, per_token=per_token))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [name for name in TABLES["retention"] if name != "triton"])
def test_16_bit_inputs_are_summed_in_float32(backend, dtype):
    """And multiplied in it, unless the processor itself multiplies them."""
    if why := why_not("retention", backend, dtype):
        pytest.skip(why)
    products = multiplied(dtype) if backend == "cpp" else None
    whole = inputs(*RETENTION["many chunks, padded"], per_token=True, dtype=dtype)
    assert_agrees(on_device(retention, backend), reference, products, **whole)


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
def test_long_chunks_of_wide_heads_are_as_exact_as_the_reference(retain, per_token, poisoned):
    assert_agrees(retain, reference, **inputs(1, 150, 2, 1, 2, 72, 80, per_token=per_token))


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
@pytest.mark.parametrize("bounds", PACKED.values(), ids=PACKED)
def test_packed_sequences_do_not_see_each_other(retain, bounds, per_token, poisoned):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = inputs(1, bounds[-1], 2, 1, 2, 4, 6, per_token=per_token, N=len(bounds) - 1)
    assert_agrees(retain, reference, **packed, cu_seqlens=cu_seqlens)


def test_a_decay_of_exp_minus_20_a_token_neither_overflows_nor_disturbs_its_neighbours(retain):
    strong = inputs(1, 70, 2, 2, 2, 8, 8, per_token=True)
    with torch.no_grad():
        strong["log_decay"].mul_(0.01)
        strong["log_decay"][:, ::7] = -20.0
    assert_agrees(retain, reference, **strong)
    strong["log_decay"] = torch.full((2,), -20.0, requires_grad=True)
    assert_agrees(retain, reference, **strong)


@pytest.mark.parametrize("T", [9, 70], ids=["few tokens", "several chunks"])
def test_memory_may_grow_whatever_the_number_of_tokens(retain, T):
    growing = inputs(1, T, 2, 1, 2, 4, 3, per_token=True)
    with torch.no_grad():
        growing["log_decay"].add_(0.15)
        growing["log_decay"][:, :, 0] = 70 / 64  # nearly as much as is allowed
    assert growing["log_decay"].max() > 0
    assert_agrees(retain, reference, **growing)
    assert_agrees(retain, reference, **growing | {"log_decay": torch.full((2,), 0.1, requires_grad=True)})


@pytest.mark.parametrize("rate", [-torch.inf, torch.finfo(torch.float32).min / 2], ids=["-inf", "-1.7e38"])
def test_forgetting_everything_disturbs_no_other_token(retain, rate):
    forgetting = inputs(2, 70, 2, 2, 2, 8, 8, per_token=True)
    with torch.no_grad():
        forgetting["log_decay"][:, 20] = forgetting["log_decay"][:, 69, 1] = rate
    assert_agrees(retain, reference, **forgetting)


def test_many_short_sequences_cost_what_their_tokens_cost(retain):
    """Padded to the longest they would take 64 times the memory of q."""
    bounds = [*range(0, 128, 2), 2048]
    q, cu_seqlens = torch.randn(1, 2048, 1, 4), torch.tensor(bounds, dtype=torch.int32)
    with torch.profiler.profile(profile_memory=True) as profile:
        retain(q, q, q, torch.zeros(1), cu_seqlens=cu_seqlens)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 32 * q.nbytes


def test_no_decay_at_all_is_linear_attention(retain):
    plain = inputs(*RETENTION["one token past a chunk"]) | {"log_decay": torch.zeros(1, requires_grad=True)}
    assert_agrees(retain, reference, **plain)


@pytest.mark.parametrize("of", ["k", "v"])
def test_gradients_through_a_state_are_summed_in_runs_of_32_by_cpp(of, instruction_set):
    """In order each 1 of 63 would be lost in the 2^24 before it: of random numbers, twice PyTorch's error."""
    q, k, v = (torch.ones(1, 1, 8, 64, requires_grad=True) for _ in range(3))  # of fewer heads V is cut
    with torch.no_grad():
        (v if of == "k" else k)[..., 0] = 2.0**24
    _, state = retention(q, k, v, None, return_final_state=True, backend="cpp")
    (got,) = torch.autograd.grad(state.sum(), k if of == "k" else v)
    assert got.min() >= 2**24 + 32


def test_scale_is_the_callers_to_choose(retain):
    assert_agrees(retain, reference, **inputs(*RETENTION["odd everything"]), scale=0.37)


def test_without_states_and_with_a_fixed_decay_only_q_k_v_get_gradients(retain):
    fixed = inputs(*RETENTION["one token past a chunk"]) | {
        "return_final_state": False,
        "initial_state": None,
    }
    fixed["log_decay"] = fixed["log_decay"].detach()
    assert_agrees(retain, reference, **fixed)


def test_views_of_a_fused_projection_are_as_good_as_contiguous_tensors(retain):
    fused = torch.randn(2, 70, 2, 24)
    q, k, v = fused.split(8, -1)
    log_decay = -torch.rand(2)
    contiguous = retain(q.contiguous(), k.contiguous(), v.contiguous(), log_decay)
    assert torch.equal(retain(q, k, v, log_decay), contiguous)


def test_two_halves_with_the_state_carried_over_equal_the_whole(retain):
    whole = inputs(2, 90, 2, 2, 2, 8, 8, per_token=True)

    def in_halves(q, k, v, log_decay, initial_state, return_final_state):
        cut = [(x[:, :40], x[:, 40:]) for x in (q, k, v, log_decay)]
        first, state = retain(*(x[0] for x in cut), initial_state=initial_state, return_final_state=True)
        second, state = retain(*(x[1] for x in cut), initial_state=state, return_final_state=True)
        return torch.cat([first, second], 1), state

    assert_agrees(in_halves, reference, **whole)


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
def test_decoding_step_by_step_equals_the_whole_sequence(step, per_token):
    whole = {
        k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs(2, 9, 4, 1, 2, 8, 4).items()
    }
    if per_token:
        whole["log_decay"] = -torch.rand(2, 9, 4)

    def by_steps(q, k, v, log_decay, initial_state, return_final_state):
        state = initial_state.clone()
        rates = log_decay.expand(2, 9, 4).unbind(1) if per_token else [log_decay] * 9
        tokens = zip(q.unbind(1), k.unbind(1), v.unbind(1), rates)
        return torch.stack([step(*token, state=state) for token in tokens], 1), state

    assert_agrees(by_steps, reference, **whole)


@pytest.mark.parametrize("backend", [name for name in TABLES["retention"] if name != "triton"])
def test_gradcheck(backend):
    if why := why_not("retention", backend, torch.float64):
        pytest.skip(why)
    whole = inputs(1, 35, 2, 1, 2, 2, 2, per_token=True, dtype=torch.float64)
    leaves = {name: x for name, x in whole.items() if isinstance(x, torch.Tensor)}

    def run(*values):
        return retention(**dict(zip(leaves, values)), return_final_state=True, backend=backend)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)
