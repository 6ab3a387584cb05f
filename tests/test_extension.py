"""The compiled library: its selective scan against the reference, and what it refuses."""

import re
import sys

import pytest
import torch
from tolerance import assert_agrees
from torch.utils._python_dispatch import TorchDispatchMode

from lcikernels import backends, extension, selective_scan
from lcikernels.ops.selective_scan.op import CHECKPOINT_EVERY
from lcikernels.ops.selective_scan.reference import selective_scan as reference

compiled = pytest.mark.skipif(extension.WHY_NOT is not None, reason=str(extension.WHY_NOT))

# B, T, D, N, G. A vector is 16, 8 or 4 channels, a chunk 32 tokens, a block 8, 2 or 1 states, a run 16.
SHAPES = {
    "one number": (64, 1, 1, 1, 1),
    "a vector and a bit": (2, 33, 17, 16, 1),
    "groups that end inside a vector": (2, 40, 21, 5, 3),
    "blocks of 8, 2 and 1 states": (2, 64, 35, 11, 1),
    "as many states as there can be": (1, 34, 16, 256, 1),
    "several tasks in a group": (1, 65, 300, 16, 1),
}

# Sequences that begin on and inside a chunk, are empty, and are longer than a chunk.
PACKED = [0, 0, 7, 39, 64, 64, 100, 101]


def inputs(B, T, D, N, G, S=None):
    def random(*shape):
        return torch.randn(*shape, requires_grad=True)

    return {
        "x": random(B, T, D),
        "dt": random(B, T, D),
        "a": (-0.2 - 2 * torch.rand(D, N)).requires_grad_(),
        "b": random(B, T, G, N),
        "c": random(B, T, G, N),
        "d": random(D),
        "z": random(B, T, D),
        "dt_bias": random(D),
        "dt_softplus": True,
        "initial_state": random(S or B, D, N),
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


@pytest.fixture(params=["base", "avx2", "avx512"])
def instruction_set(request):
    """Each build of the kernels that this machine can run."""
    best = torch.ops.lcikernels_cpp.instruction_set()
    try:
        torch.ops.lcikernels_cpp.use_instruction_set(request.param)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    yield request.param
    torch.ops.lcikernels_cpp.use_instruction_set(best)


@compiled
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(shape, instruction_set, poisoned):
    assert_agrees(scan, reference, **inputs(*shape))


@compiled
def test_packed_sequences_are_as_exact_as_the_reference(instruction_set, poisoned):
    assert_agrees(scan, reference, **packed())


@compiled
@pytest.mark.parametrize("missing", ["d", "z", "dt_bias", "initial_state", "dt_softplus"])
def test_what_is_optional_can_be_left_out(missing, poisoned):
    arguments = inputs(2, 40, 17, 3, 1)
    if missing == "dt_softplus":
        arguments["dt"] = arguments["dt"].detach().abs().requires_grad_()
        arguments["dt_bias"] = arguments["dt_bias"].detach().abs().requires_grad_()
    assert_agrees(scan, reference, **arguments | {missing: False if missing == "dt_softplus" else None})


@compiled
def test_the_gradient_of_the_final_state_alone_reaches_every_input():
    def last(**arguments):
        return scan(**arguments)[1]

    def last_reference(**arguments):
        return reference(**arguments)[1]

    arguments = inputs(2, 40, 17, 3, 1)
    for unused in ("c", "d", "z"):                                        # they do not enter the state
        arguments[unused] = arguments[unused].detach()
    assert_agrees(last, last_reference, **arguments)


@compiled
def test_exp_is_within_two_ulp_for_every_argument(instruction_set):
    """With x = 0 and one step, y is exp(dt a): over all float32 can hold, for an a whose products round."""
    if instruction_set == "base":
        pytest.skip("without an FMA the product dt a rounds, as in PyTorch")
    dt = torch.linspace(0, 66, 100_000)[None, None]
    D, one = dt.shape[2], torch.ones(1, 1, 1)
    a = torch.full((D, 1), -1.3)
    y = scan(x=torch.zeros(1, 1, D), dt=dt, a=a, b=one, c=one, initial_state=torch.ones(1, D, 1))
    truth = torch.exp(dt.double() * a[0].double())
    ulp = torch.nextafter(truth.float(), torch.tensor(torch.inf)) - truth.float()
    assert ((y.double() - truth).abs() / ulp).max() <= 2


@compiled
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_in_its_sequence_and_its_channel(poison):
    clean = packed()
    dirty = dict(clean, x=clean["x"].detach().clone().requires_grad_())
    start, end, channel = 7, 39, 4                                        # sequence 2
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


@compiled
def test_two_runs_and_one_thread_or_two_give_the_same_bits():
    arguments = inputs(2, 70, 300, 16, 1)
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


@compiled
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


@compiled
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


# What the library says to whoever calls it past the Python checks: nothing is read before everything fits.
MISFITS = {
    "x must be [B, T, D], got shape (2, 33)": {"x": torch.zeros(2, 33)},
    "dt must be [B, T, D] with T=33, got 32 on axis 1 of shape (2, 32, 17)": {"dt": torch.zeros(2, 32, 17)},
    "dt must be Float, got Double": {"dt": torch.zeros(2, 33, 17, dtype=torch.float64)},
    "a must be [D, N] with D=17, got 16 on axis 0 of shape (16, 4)": {"a": torch.zeros(16, 4)},
    "b must be [B, T, G, N], got shape (2, 33, 4)": {"b": torch.zeros(2, 33, 4)},
    "c must be [B, T, G, N] with N=4, got 3 on axis 3 of shape (2, 33, 1, 3)": {
        "c": torch.zeros(2, 33, 1, 3)
    },
    "b must be such that its groups divide D=17, got 2": {
        "b": torch.zeros(2, 33, 2, 4),
        "c": torch.zeros(2, 33, 2, 4),
    },
    "x must be [B, T, D] with T at least 1, got 0 on axis 1 of shape (2, 0, 17)": {
        "x": torch.zeros(2, 0, 17)
    },
    "d must be [D] with D=17, got 18 on axis 0 of shape (18,)": {"d": torch.zeros(18)},
    "z must be contiguous, got strides (561, 1, 33)": {"z": torch.zeros(2, 17, 33).mT},
    "initial_state must be [S, D, N] with S=2, got 1 on axis 0 of shape (1, 17, 4)": {
        "initial_state": torch.zeros(1, 17, 4)
    },
    "cu_seqlens must be given only with B=1 (packed sequences share one row), got B=2": {
        "cu_seqlens": torch.tensor([0, 33], dtype=torch.int32)
    },
}


def library_call(**changes):
    zeros = torch.zeros
    arguments = dict(x=zeros(2, 33, 17), dt=zeros(2, 33, 17), a=zeros(17, 4), b=zeros(2, 33, 1, 4))
    arguments |= dict(c=zeros(2, 33, 1, 4), d=None, z=None, dt_bias=None, dt_softplus=True)
    arguments |= dict(initial_state=None, cu_seqlens=None, keep_checkpoints=False)
    return torch.ops.lcikernels_cpp.selective_scan_forward(**arguments | changes)


@compiled
@pytest.mark.parametrize("sentence", MISFITS)
def test_the_library_refuses_what_does_not_fit(sentence):
    library_call()
    with pytest.raises(RuntimeError) as refusal:
        library_call(**MISFITS[sentence])
    assert f"selective_scan: {sentence}" in str(refusal.value)


@compiled
@pytest.mark.parametrize("bounds", [[0, 34], [1, 33], [0, 20, 10, 33], [0, -5, 33], [33]])
def test_the_library_never_follows_boundaries_out_of_the_row(bounds):
    zeros, cu_seqlens = torch.zeros, torch.tensor(bounds, dtype=torch.int32)
    row = dict(x=zeros(1, 33, 17), dt=zeros(1, 33, 17), b=zeros(1, 33, 1, 4), c=zeros(1, 33, 1, 4))
    with pytest.raises(RuntimeError, match="selective_scan: cu_seqlens must be"):
        library_call(**row, cu_seqlens=cu_seqlens)


@compiled
def test_the_library_refuses_checkpoints_of_another_length():
    x, a, bc, state = (torch.zeros(shape) for shape in ((1, 33, 4), (4, 3), (1, 33, 1, 3), (1, 1, 3, 4)))
    with pytest.raises(RuntimeError, match=r"checkpoints must be .* with chunks=2, got 1 on axis 0"):
        torch.ops.lcikernels_cpp.selective_scan_backward(
            x, None, state, x, x, a, bc, bc, None, None, None, False, None, None
        )


@compiled
def test_cpp_is_preferred_on_a_cpu_and_says_why_it_cannot_run():
    x, a, b = torch.zeros(1, 3, 4), torch.zeros(4, 2), torch.zeros(1, 3, 2)
    assert backends.choose("selective_scan", None, x) == "cpp"
    x, b = x.bfloat16(), b.bfloat16()
    assert backends.choose("selective_scan", None, x) == "torch"
    with pytest.raises(RuntimeError) as refusal:
        scan(x=x, dt=x, a=a, b=b, c=b)
    reason = "it computes in float32 only, x is torch.bfloat16"
    assert str(refusal.value) == f"selective_scan: backend 'cpp' cannot run here: {reason}"


@compiled
def test_an_instruction_set_that_was_not_built_is_refused():
    with pytest.raises(RuntimeError, match="use_instruction_set: name must be one of base.*, got sse9"):
        torch.ops.lcikernels_cpp.use_instruction_set("sse9")


def test_a_library_that_is_missing_or_broken_is_a_reason(tmp_path):
    assert "LCIKERNELS_BUILD=cpu" in extension.load(tmp_path / "_C.so")
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert f"{tmp_path / '_C.so'} does not load" in extension.load(tmp_path / "_C.so")


@pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux only")
def test_the_library_calls_no_python():
    """So it serves every Python: nothing in it asks for a Py* symbol."""
    library = extension.LIBRARY
    if not library.exists():
        pytest.skip("not compiled")
    assert not re.search(rb"\0_?Py[A-Z_]", library.read_bytes())
