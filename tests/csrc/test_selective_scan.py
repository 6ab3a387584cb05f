"""The compiled selective scan on every instruction set: what the shapes of tests/ops do not reach."""

import pytest
import torch
from tolerance import assert_agrees
from torch.utils._python_dispatch import TorchDispatchMode

from lcikernels import extension, selective_scan, selective_scan_step
from lcikernels.ops.selective_scan.op import CHECKPOINT_EVERY
from lcikernels.ops.selective_scan.reference import selective_scan as reference

pytestmark = pytest.mark.skipif(extension.WHY_NOT is not None, reason=str(extension.WHY_NOT))

# B, T, D, N, G. A vector is 16, 8 or 4 channels, a chunk 32 tokens, a block 8, 2 or 1 states, a run 16.
SHAPES = {
    "one number": (64, 1, 1, 1, 1),
    "a vector and a bit": (2, 33, 17, 16, 1),
    "groups that end inside a vector": (2, 40, 21, 5, 3),
    "blocks of 8, 2 and 1 states": (2, 64, 35, 11, 1),
    "as many states as there can be": (1, 34, 16, 256, 1),
    "several tasks in a group": (1, 65, 300, 16, 1),
    "few channels, many tokens: parts of the sequence at once": (1, 1100, 6, 3, 2),
}

# Sequences that begin on and inside a chunk, are empty, and are longer than a chunk.
PACKED = [0, 0, 7, 39, 64, 64, 100, 101]


def inputs(B, T, D, N, G, S=None, dtype=torch.float32):
    exact = torch.promote_types(dtype, torch.float32)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return {
        "x": random(B, T, D),
        "dt": random(B, T, D),
        "a": (-0.2 - 2 * torch.rand(D, N, dtype=exact)).requires_grad_(),
        "b": random(B, T, G, N),
        "c": random(B, T, G, N),
        "d": random(D, dtype=exact),
        "z": random(B, T, D),
        "dt_bias": random(D, dtype=exact),
        "dt_softplus": True,
        "initial_state": random(S or B, D, N, dtype=exact),
        "return_final_state": True,
    }


def packed():
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32)
    return inputs(1, PACKED[-1], 21, 5, 3, S=len(PACKED) - 1) | {"cu_seqlens": cu_seqlens}


def scan(**arguments):
    return selective_scan(**arguments, backend="cpp")


def outputs_and_gradients(arguments):
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    y, state = scan(**arguments)
    return [y, state, *torch.autograd.grad(y.sum() + state.square().sum(), leaves)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(shape, instruction_set, poisoned):
    assert_agrees(scan, reference, **inputs(*shape))


def test_packed_sequences_are_as_exact_as_the_reference(instruction_set, poisoned):
    assert_agrees(scan, reference, **packed())


@pytest.mark.parametrize("missing", ["d", "z", "dt_bias", "initial_state", "dt_softplus"])
def test_what_is_optional_can_be_left_out(missing, poisoned):
    arguments = inputs(2, 40, 17, 3, 1)
    if missing == "dt_softplus":
        arguments["dt"] = arguments["dt"].detach().abs().requires_grad_()
        arguments["dt_bias"] = arguments["dt_bias"].detach().abs().requires_grad_()
    assert_agrees(scan, reference, **arguments | {missing: False if missing == "dt_softplus" else None})


def test_the_gradient_of_the_final_state_alone_reaches_every_input():
    def last(**arguments):
        return scan(**arguments)[1]

    def last_reference(**arguments):
        return reference(**arguments)[1]

    arguments = inputs(2, 40, 17, 3, 1)
    for unused in ("c", "d", "z"):  # they do not enter the state
        arguments[unused] = arguments[unused].detach()
    assert_agrees(last, last_reference, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_exact_as_the_reference(dtype, instruction_set, poisoned):
    for shape in "a vector and a bit", "blocks of 8, 2 and 1 states":
        assert_agrees(scan, reference, **inputs(*SHAPES[shape], dtype=dtype))


def decays(dt, rate):
    """exp(dt a) of each dt for a = rate log(2): with x = 0 and one step it is y."""
    D, one = dt.shape[0], torch.ones(1, 1, 1)
    a = torch.full((D, 1), rate)
    y = scan(x=torch.zeros(1, 1, D), dt=dt[None, None], a=a, b=one, c=one, initial_state=torch.ones(1, D, 1))
    in_units_of_log_2 = (a[0] * torch.tensor(1.4426950408889634)).double()
    return y[0, 0], torch.exp2(dt.double() * in_units_of_log_2)


def test_exp_is_within_two_ulp_of_every_product(instruction_set):
    if instruction_set == "base":
        pytest.skip("without an FMA the product dt a rounds, as in PyTorch")
    y, truth = decays(torch.linspace(0, 66, 100_000), -1.3)
    ulp = torch.nextafter(truth.float(), torch.tensor(torch.inf)) - truth.float()
    assert ((y.double() - truth).abs() / ulp).max() <= 2


def test_exp_far_from_zero_is_next_to_nothing(instruction_set):
    y, _ = decays(torch.logspace(2, 37, 1000), -1.3)
    assert (y >= 0).all() and (y <= 2.0**-126).all()


def test_one_token_is_as_exact_as_the_reference(instruction_set):
    for B, D, N, G in (2, 37, 5, 1), (1, 40, 16, 2), (3, 300, 33, 1):
        token = inputs(B, 1, D, N, G)
        state = token["initial_state"].detach()

        def step(initial_state, return_final_state, a, d, dt_bias, dt_softplus, **tokens):
            state = initial_state.clone()
            tokens = {name: u[:, 0] for name, u in tokens.items()}
            options = dict(a=a, d=d, dt_bias=dt_bias, dt_softplus=dt_softplus, state=state)
            return selective_scan_step(**tokens, **options, backend="cpp")[:, None], state

        frozen = {name: u.detach() if isinstance(u, torch.Tensor) else u for name, u in token.items()}
        assert_agrees(step, reference, **frozen | {"initial_state": state})


def test_the_state_of_a_step_may_be_a_view():
    token = {name: u for name, u in inputs(2, 1, 8, 4, 1).items() if isinstance(u, torch.Tensor)}
    state = token.pop("initial_state").detach()
    tokens = {name: u.detach()[:, 0] for name, u in token.items() if name in {"x", "dt", "b", "c", "z"}}
    tokens["a"] = token["a"].detach()
    view = state.mT.contiguous().mT
    expected = selective_scan_step(**tokens, state=state, backend="torch")
    torch.testing.assert_close(selective_scan_step(**tokens, state=view, backend="cpp"), expected)
    torch.testing.assert_close(view, state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_in_its_sequence_and_its_channel(poison):
    clean = packed()
    dirty = dict(clean, x=clean["x"].detach().clone().requires_grad_())
    start, end, channel = 7, 39, 4  # sequence 2
    with torch.no_grad():
        dirty["x"][0, 10, channel] = poison
    y, state, dx = (outputs_and_gradients(clean)[i] for i in (0, 1, 2))
    y_dirty, state_dirty, dx_dirty = (outputs_and_gradients(dirty)[i] for i in (0, 1, 2))
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, start:end, channel] = True
    assert not y_dirty[0, 10:end, channel].isfinite().any()
    assert torch.equal(y[~touched], y_dirty[~touched])
    assert torch.equal(dx[~touched], dx_dirty[~touched])
    assert not state_dirty[2, channel].isfinite().any()
    state_dirty[2, channel] = state[2, channel]
    assert torch.equal(state, state_dirty)


FAR = {
    "a long step": ("dt", 1e30),
    "an endless step": ("dt", float("inf")),
    "a sudden rate": ("a", -float("inf")),
}


@pytest.mark.parametrize("name, value", FAR.values(), ids=FAR)
def test_a_channel_out_of_reach_of_exp_changes_no_bit_of_its_neighbours(name, value, instruction_set):
    """Some of them are lanes of the same vector."""
    clean = inputs(2, 40, 40, 5, 1)
    far = dict(clean, **{name: clean[name].detach().clone().requires_grad_()})
    channel, others = 4, torch.arange(40) != 4
    with torch.no_grad():
        far[name][(channel, 2) if name == "a" else (0, 10, channel)] = value
    leaves = ["x", "dt", "a", "d", "z", "dt_bias", "initial_state"]
    axes = dict(zip(["y", "state", *leaves], [2, 1, 2, 2, 0, 0, 2, 0, 1]))
    results = []
    for arguments in clean, far:
        y, state = scan(**arguments)
        grads = torch.autograd.grad(y.sum() + state.sum(), [arguments[leaf] for leaf in leaves])
        results.append([y, state, *grads])
    for (what, axis), x, x_far in zip(axes.items(), *results):
        assert torch.equal(x.movedim(axis, 0)[others], x_far.movedim(axis, 0)[others]), what


@pytest.mark.parametrize("name", ["x", "dt", "a", "dt_bias"])
def test_every_kind_of_nan_stays_one(name, instruction_set):
    """Bits that are all ones are a NaN, which adding to its exponent turns into a number."""
    arguments = inputs(1, 40, 17, 3, 1)
    with torch.no_grad():
        arguments[name].view(-1)[0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
        y, state = scan(**arguments)
    assert y[0, :, 0].isnan().all() and state[0, 0].isnan().any()
    assert y[0, :, 1:].isfinite().all() and state[0, 1:].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 70, 300, 16, 1), (1, 1100, 6, 3, 2)], ids=["channels", "time"])
def test_two_runs_and_one_thread_or_two_give_the_same_bits(shape):
    arguments = inputs(*shape)
    first = outputs_and_gradients(arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outputs_and_gradients(arguments)
        torch.set_num_threads(2)
        assert all(map(torch.equal, first, alone))
        assert all(map(torch.equal, first, outputs_and_gradients(arguments)))
    finally:
        torch.set_num_threads(threads)


def test_the_forward_pass_gives_the_same_bits_on_any_number_of_threads(instruction_set):
    """Also where only some channels are within reach of exp: with more threads a task has fewer of them."""
    arguments = inputs(1, 40, 300, 5, 1)
    threads, results = torch.get_num_threads(), []
    try:
        with torch.no_grad():
            arguments["a"][::100] *= 1e7
            for count in 1, 3, 9:
                torch.set_num_threads(count)
                results.append(scan(**arguments))
    finally:
        torch.set_num_threads(threads)
    for y, state in results:
        assert torch.equal(y, results[0][0]) and torch.equal(state, results[0][1])


@pytest.mark.parametrize("shape", [(1, 70, 100, 16, 1), (1, 1100, 6, 3, 2)], ids=["channels", "time"])
def test_more_threads_than_cores_give_the_same_bits(shape):
    """Of all but the gradients of b and c, whose sums over channels are cut where tasks are."""
    arguments = inputs(*shape)
    names = ["y", "state", *(name for name, x in arguments.items() if isinstance(x, torch.Tensor))]
    threads, results = torch.get_num_threads(), []
    try:
        for count in 1, 16:
            torch.set_num_threads(count)
            results.append(dict(zip(names, outputs_and_gradients(arguments))))
    finally:
        torch.set_num_threads(threads)
    for name in results[0].keys() - {"b", "c"}:
        assert torch.equal(results[0][name], results[1][name]), name


# S, T, D, G
MANY_CORES = {
    "a batch of mamba-130m": (8, 2048, 1536, 1),
    "one sequence of mamba-2.8b": (1, 2048, 5120, 1),
    "heads of Mamba-2": (4, 4096, 1536, 8),
    "few channels, many tokens": (1, 65536, 64, 1),
}


@pytest.mark.parametrize("shape", MANY_CORES.values(), ids=MANY_CORES)
def test_there_is_a_task_for_each_of_64_cores(shape):
    threads, tasks = torch.get_num_threads(), torch.ops.lcikernels_cpp.selective_scan_tasks
    try:
        torch.set_num_threads(64)
        assert tasks(*shape) >= 64
    finally:
        torch.set_num_threads(threads)


def test_what_goes_past_the_caches_has_the_same_bits(past_caches):
    """Of three tensors like x; halves of them do not."""
    D = 1664
    arguments = inputs(1, past_caches // (4 * 3 * D) + 1, D, 1, 1) | {"initial_state": None}
    halves = []
    for i in range(2):
        cut = {name: u.detach().chunk(2, -1)[i] for name, u in arguments.items() if name in ("x", "dt", "z")}
        cut |= {name: arguments[name].detach().chunk(2)[i] for name in ("a", "d", "dt_bias")}
        cut = {name: u.contiguous().requires_grad_() for name, u in cut.items()}
        y, *gradients = outputs_and_gradients(arguments | cut)
        halves.append([y, *gradients[1:3]])
    y, _, dx, ddt, *_ = outputs_and_gradients(arguments)
    for whole, *parts in zip((y, dx, ddt), *halves):
        assert torch.equal(whole, torch.cat(parts, -1))


def test_strided_inputs_give_the_same_bits():
    arguments = inputs(2, 33, 17, 16, 1)
    strided = {
        name: x.detach().mT.contiguous().mT.requires_grad_() if name in {"x", "dt", "z", "a"} else x
        for name, x in arguments.items()
    }
    assert not strided["x"].is_contiguous()
    assert all(map(torch.equal, outputs_and_gradients(arguments), outputs_and_gradients(strided)))


class Checkpoints(TorchDispatchMode):
    """How many numbers each selective scan keeps for its backward pass."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.lcikernels.selective_scan.default:
            self.kept.append(out[2].numel())
        return out


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_inference_keeps_no_checkpoints(backend):
    arguments = inputs(2, 64, 17, 16, 1) | {"backend": backend}
    frozen = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with Checkpoints() as mode:
        selective_scan(**arguments)
        selective_scan(**frozen)
        with torch.no_grad():
            selective_scan(**arguments)
    assert mode.kept == [64 // CHECKPOINT_EVERY[backend] * 2 * 17 * 16, 0, 0]


@pytest.mark.parametrize("bounds", [[0, 102], [1, 101], [0, 50, 20, 101]])
def test_boundaries_that_do_not_cover_the_row_are_refused_before_the_library_is_entered(bounds):
    arguments = packed() | {"initial_state": None, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    with pytest.raises(ValueError) as refused:
        scan(**arguments)
    sentence = f"selective_scan: cu_seqlens must be 0 first, T=101 last and never falling, got {bounds}"
    assert str(refused.value) == sentence
