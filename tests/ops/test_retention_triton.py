"""Retention in Triton: what the shapes of test_retention.py do not reach."""

import pytest
import torch
from devices import GPU, on_device, why_not
from memory import Memory, without_launches
from tolerance import assert_agrees

from lcikernels import backends, retention, retention_step
from lcikernels.ops.retention.reference import retention as reference

if why := why_not("retention", "triton"):
    pytest.skip(why, allow_module_level=True)

from lcikernels.ops.retention import chunks, kernel, launch, tiles

retain, step = on_device(retention, "triton"), on_device(retention_step, "triton")
on_a_gpu = pytest.mark.skipif(GPU == "cpu", reason="takes minutes in Triton's interpreter")


def inputs(B, T, Hq, Hk, Hv, K, V, *, N=None, dtype=torch.float32, per_token=True):
    H = max(Hq, Hk, Hv)
    heads = {"q": (Hq, K), "k": (Hk, K), "v": (Hv, V)}
    tokens = {name: torch.randn(B, T, *size, dtype=dtype, requires_grad=True) for name, size in heads.items()}
    rates = (-0.2 * torch.rand((B, T, H) if per_token else H)).requires_grad_()
    state = torch.randn(N or B, H, K, V, requires_grad=True)
    return tokens | {"log_decay": rates, "initial_state": state, "return_final_state": True}


def without_gradients(whole: dict) -> dict:
    return {name: u.detach() if isinstance(u, torch.Tensor) else u for name, u in whole.items()}


@pytest.fixture
def in_segments(monkeypatch):
    """Sequences are cut, as on a GPU that they do not fill; of 16 tokens float32 makes one chunk."""
    monkeypatch.setattr(launch, "segment", lambda *_: 32)


@pytest.fixture
def by_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "SHORT", 0)


@pytest.mark.parametrize("learned", [True, False], ids=["learned decay", "fixed decay"])
def test_segments_make_no_difference(in_segments, learned, poisoned):
    whole = inputs(2, 75, 2, 1, 2, 5, 7)
    whole["log_decay"].requires_grad_(learned)
    assert_agrees(retain, reference, **whole)


def test_packed_sequences_are_cut_into_segments(in_segments, poisoned):
    bounds = torch.tensor([0, 0, 3, 35, 70, 70], dtype=torch.int32)
    whole = inputs(1, 70, 2, 1, 2, 4, 6, N=5)
    whole["log_decay"] = whole["log_decay"].detach()
    assert_agrees(retain, reference, **whole, cu_seqlens=bounds)


@pytest.mark.parametrize("at_once", [1, 2])
def test_rows_that_a_program_has_no_room_for_are_walked_after_the_others(at_once, monkeypatch, poisoned):
    """3 tiles of both K and V; with 2 at once the last program has 1."""
    monkeypatch.setattr(launch, "SMALL", 16)
    monkeypatch.setattr(launch, "chosen", lambda *_: tiles.Tile(16, 16, at_once, 4, 1))
    assert_agrees(retain, reference, **inputs(1, 20, 2, 1, 2, 48, 40))


def test_wide_heads_are_walked_by_descriptors_as_by_pointers(in_16_bits, monkeypatch, poisoned):
    """Segments of 3 chunks and the rest of a row; 136 rows are 3 tiles, 40 columns are not a tile."""
    monkeypatch.setattr(launch, "segment", lambda *_: 192)
    whole = without_gradients(inputs(2, 210, 1, 1, 1, 136, 40, dtype=torch.bfloat16, per_token=False))
    loaded = []
    monkeypatch.setattr(launch, "described", lambda *x: loaded.append(x) or chunks.described(*x))
    ahead = retain(**whole)
    assert len(loaded) == 5  # x, y, z, P and the output
    monkeypatch.setattr(launch, "describable", lambda x: False)
    assert all(map(torch.equal, ahead, retain(**whole)))


def test_boundaries_that_nobody_looked_at_touch_no_other_memory(monkeypatch):
    """As on a GPU, where to look would be to wait: a row between two others stays as it is."""
    monkeypatch.setattr(kernel, "looked_at", lambda x: False)
    monkeypatch.setattr(launch, "segment", lambda *_: 32)
    for bounds in ([0, 90, 20, 40], [-50, 10, 10, 1 << 30], [40, 30, 20, 0]):
        q = torch.randn(3, 40, 1, 4)[1:2]
        outside = torch.full((3, 40, 1, 4), 7.0)
        monkeypatch.setattr(launch.Problem, "empty", inside(outside, launch.Problem.empty))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        kernel.forward(q, q, q, torch.zeros(1), 0.5, None, cu_seqlens)
        assert outside[0].eq(7).all() and outside[2].eq(7).all()


def inside(outside: torch.Tensor, empty):
    """Memory for o [1, 40, 1, 4] is the middle of `outside`."""

    def run(self, *shape, **named):
        return outside[1:2] if shape == (1, 40, 1, 4) else empty(self, *shape, **named)

    return run


@pytest.mark.parametrize("shares", [(1, 2, 4), (2, 1, 4), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 9])
def test_gradients_of_shared_heads_are_summed_where_they_are_made(shares, multiprocessors, monkeypatch):
    """All heads by one program, or few by each of so many programs as fill the GPU."""
    monkeypatch.setattr(launch, "device", lambda x: (multiprocessors, 90))
    whole = inputs(1, 20, *shares, 3, 4)
    whole["log_decay"].requires_grad_(multiprocessors == 1)
    assert_agrees(retain, reference, **whole)


def test_short_sequences_are_the_same_by_chunks(by_chunks, poisoned):
    assert_agrees(retain, reference, **inputs(2, 7, 3, 1, 3, 5, 11, per_token=False))


# The known faults of Triton's compiler that such kernels met: wrong gradients on a Hopper with 4 warps or
# with 8, products of transposed tiles, sizes that are no powers of 2. B, T, Hq, Hk, Hv, K, V.
TENSOR_CORES = {
    "4 warps": (1, 130, 2, 2, 2, 64, 64),
    "8 warps": (1, 130, 2, 2, 2, 64, 128),
    "Mamba-2, one group": (1, 130, 1, 1, 3, 128, 64),
    "odd sizes": (1, 100, 1, 1, 1, 100, 60),
    "rows in parts of 256 and 64": (1, 70, 1, 1, 1, 320, 65),
}
HALVES = torch.bfloat16, torch.float16
# The interpreter takes them in turns, a GPU both.
HALVED = [(x, HALVES[i % 2]) for i, x in enumerate(TENSOR_CORES)]
HALVED += [(x, HALVES[1 - i % 2]) for i, x in enumerate(TENSOR_CORES) if GPU != "cpu"]
WIDE = {"RetNet": (2, 333, 2, 2, 2, 256, 512), "the widest": (1, 130, 2, 2, 2, 512, 512)}


@pytest.fixture
def in_16_bits(tensor_cores, monkeypatch):
    """The interpreter takes bfloat16 too."""
    there = backends.Backend("lcikernels.ops.retention.kernel", backends.on_gpu)
    monkeypatch.setitem(backends.TABLES["retention"], "triton", there)


@pytest.mark.parametrize("shape, dtype", HALVED, ids=str)
def test_tensor_cores_are_as_exact_as_their_inputs(shape, dtype, in_16_bits, poisoned):
    assert_agrees(retain, reference, products=dtype, **inputs(*TENSOR_CORES[shape], dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES[GPU == "cpu" :], ids=str)
def test_packed_heads_of_odd_sizes_are_as_exact_as_their_inputs(dtype, in_16_bits, poisoned):
    bounds = torch.tensor([0, 1, 1, 66, 70], dtype=torch.int32)
    whole = inputs(1, 70, 1, 1, 1, 100, 60, N=4, dtype=dtype)
    assert_agrees(retain, reference, products=dtype, **whole, cu_seqlens=bounds)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", WIDE.values(), ids=WIDE)
def test_wide_heads_are_as_exact_as_their_inputs(shape, dtype, in_16_bits, poisoned):
    assert_agrees(retain, reference, products=dtype, **inputs(*shape, dtype=dtype, per_token=False))


@pytest.mark.parametrize("dtype", HALVES[: 1 + (GPU != "cpu")], ids=str)
def test_segments_in_16_bits(dtype, in_16_bits, monkeypatch, poisoned):
    monkeypatch.setattr(launch, "segment", lambda *_: 64)
    whole = inputs(1, 150, 2, 1, 2, 16, 32, dtype=dtype)
    whole["log_decay"] = whole["log_decay"].detach()
    assert_agrees(retain, reference, products=dtype, **whole)


def test_float16_states_are_more_than_float16_holds(tensor_cores):
    """After 40 tokens of 60 x 60 they are 144000."""
    q = torch.full((1, 40, 1, 4), 1e-3, dtype=torch.float16)
    kv = torch.full((1, 40, 1, 4), 60.0, dtype=torch.float16)
    o, state = retain(q, kv, kv, torch.zeros(1), return_final_state=True)
    assert state.eq(144000).all()
    expected = torch.arange(1, 41) * 3600.0 * 4 * q[0, 0, 0, 0].item() * 0.5
    torch.testing.assert_close(o[0, :, 0, 0].float(), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("learned, most", [(False, 1.25), (True, 2.6)], ids=["fixed decay", "learned decay"])
def test_memory_is_that_of_inputs_and_outputs_unless_all_states_are_asked_for(learned, most, monkeypatch):
    """RetNet's heads on an H200. The states that enter 64 chunks, and their gradients, are 2.1 GB; the sums
    in float32 that dq and dk are rounded from, once, are 0.27, a sixth of all."""
    without_launches(monkeypatch, launch, 132, 90)
    B, T, H, K, V = 8, 4096, 8, 256, 512
    with Memory() as memory, torch.device("meta"):
        q, k = (torch.empty(B, T, H, K, dtype=torch.bfloat16) for _ in "qk")
        v, do = (torch.empty(B, T, H, V, dtype=torch.bfloat16) for _ in range(2))
        inputs = q, k, v, torch.empty(H), 0.5, None, None
        o, final = kernel.forward(*inputs)
        grads = kernel.backward(do, None, *inputs, learned)
    given = [u for u in (*inputs, do, o, final, *grads) if isinstance(u, torch.Tensor)]
    assert memory.most <= most * sum(u.untyped_storage().nbytes() for u in given)


def test_one_tensor_may_be_q_k_and_v():
    whole = inputs(1, 40, 2, 2, 2, 6, 6)
    one = whole | dict(q=whole["v"], k=whole["v"])
    apart = whole | dict(q=whole["v"].clone(), k=whole["v"].clone())
    for got, want in zip(retain(**one), retain(**apart)):
        assert torch.equal(got, want)


def test_two_runs_are_equal_to_the_bit(in_16_bits):
    whole = inputs(1, 130, 2, 1, 2, 64, 128, dtype=torch.bfloat16)
    leaves = [u for u in whole.values() if isinstance(u, torch.Tensor)]

    def run() -> list[torch.Tensor]:
        out = retain(**whole)
        return [*out, *torch.autograd.grad(out, leaves, [torch.ones_like(u) for u in out])]

    assert all(map(torch.equal, run(), run()))


@on_a_gpu
def test_a_million_tokens_lose_nothing_of_a_state():
    k, v = torch.rand(1, 1 << 20, 1, 16), torch.rand(1, 1 << 20, 1, 16)
    _, state = retain(k, k, v, torch.zeros(1), return_final_state=True)
    sums = torch.einsum("tk,tv->kv", k[0, :, 0].double(), v[0, :, 0].double())
    torch.testing.assert_close(state[0, 0].double(), sums, rtol=1e-4, atol=0)


@on_a_gpu
def test_offsets_may_be_more_than_32_bits_hold():
    """The last tokens of 2^31 elements, of which nothing before 200 tokens is left, equal those alone."""
    q, k = (torch.randn(1, (1 << 20) + 100, 16, 16, dtype=torch.bfloat16, device=GPU) for _ in "qk")
    v = torch.randn(1, q.shape[1], 16, 128, dtype=torch.bfloat16, device=GPU)
    ends = []
    for cut in (slice(None), slice(-292, None)):  # of whole chunks of 64
        leaves = [u[:, cut].detach().requires_grad_() for u in (q, k, v)]
        o = retention(*leaves, torch.full((16,), -1.0, device=GPU), backend="triton")
        ends.append([u[:, -64:] for u in (o, *torch.autograd.grad(o.float().square().sum(), leaves))])
    for whole, end in zip(*ends):
        assert torch.equal(whole, end)


@pytest.mark.parametrize("name, shape", {"q": (513, 4), "v": (4, 513)}.items())
def test_more_than_512_rows_or_columns_are_refused(name, shape):
    K, V = shape
    q, v = torch.zeros(1, 20, 1, K), torch.zeros(1, 20, 1, V)
    with pytest.raises(ValueError, match=f"retention: {name} must be .* at most 512, got 513"):
        retain(q, q, v, torch.zeros(1))


# Hq, Hk, Hv, K, V
ONE_TOKEN = {
    "odd everything": (3, 3, 3, 5, 11),
    "shared heads, two tiles of columns": (4, 1, 2, 8, 40),
    "more keys than a power of 2": (1, 2, 2, 20, 3),
}


def one_token(q, k, v, log_decay, initial_state, return_final_state=True):
    state = initial_state.clone()
    o = step(*(u[:, 0] for u in (q, k, v, log_decay)), state=state)
    return o[:, None], state


@pytest.mark.parametrize("shape", ONE_TOKEN.values(), ids=ONE_TOKEN)
def test_a_step_equals_the_sequence_of_one_token(shape, poisoned):
    assert_agrees(one_token, reference, **without_gradients(inputs(2, 1, *shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, op", {1: one_token, 9: retain}.items())
def test_few_tokens_of_16_bits_are_computed_in_float32(T, op, dtype, in_16_bits, poisoned):
    assert_agrees(op, reference, **without_gradients(inputs(2, T, 2, 1, 2, 5, 3, dtype=dtype)))


def test_a_decay_of_minus_infinity_forgets_everything():
    whole = without_gradients(inputs(1, 1, 2, 2, 2, 4, 3))
    whole["log_decay"] = torch.full((1, 1, 2), -torch.inf)
    _, state = one_token(**whole)
    torch.testing.assert_close(state, whole["k"][:, 0, :, :, None] * whole["v"][:, 0, :, None, :])


def test_a_step_updates_a_state_of_any_strides():
    whole = without_gradients(inputs(2, 1, 2, 2, 2, 5, 3))
    q, k, v, log_decay = (whole[name][:, 0] for name in ("q", "k", "v", "log_decay"))
    dense = whole["initial_state"]
    state = dense.mT.contiguous().mT
    o = step(q, k, v, log_decay, state=state)
    torch.testing.assert_close(o, step(q, k, v, log_decay, state=dense))  # sums may go in another order
    torch.testing.assert_close(state, dense)
