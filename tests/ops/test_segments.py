"""What a segment of a sequence adds to a state, and what it leaves of it."""

from functools import partial
from importlib import import_module

import pytest
import torch
from devices import able, multiplied, on_device, placed, why_not
from layouts import along_tokens
from shapes import RETENTION, SELECTIVE_SCAN
from tolerance import Errors, assert_agrees

from lcikernels import retention_segment, selective_scan_segment
from lcikernels.backends import TABLES, choose, load
from lcikernels.ops.retention import reference as retention_reference
from lcikernels.ops.selective_scan import reference as scan_reference


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def retention_inputs(B, T, Hq, Hk, Hv, K, V, *, per_token=False, dtype=torch.float32):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    H = max(Hq, Hk, Hv)
    rates = -0.2 * torch.rand((B, T, H) if per_token else H, dtype=exact)
    return {
        "k": leaf(B, T, Hk, K, dtype=dtype),
        "v": leaf(B, T, Hv, V, dtype=dtype),
        "log_decay": rates.requires_grad_(),
    }


def scan_inputs(B, T, D, N, G=None, *, dtype=torch.float32):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": leaf(B, T, D, dtype=dtype),
        "dt": leaf(B, T, D, dtype=dtype),
        "a": (-torch.rand(D, N, dtype=exact)).requires_grad_(),
        "b": leaf(*((B, T, N) if G is None else (B, T, G, N)), dtype=dtype),
        "dt_bias": leaf(D, dtype=exact),
        "dt_softplus": True,
    }


@pytest.fixture(params=TABLES["retention_segment"])
def retain(request):
    return able(retention_segment, request.param)


@pytest.fixture(params=[name for name in TABLES["selective_scan_segment"] if name != "triton"])
def scan(request):
    return able(selective_scan_segment, request.param)


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
@pytest.mark.parametrize("shape", RETENTION.values(), ids=RETENTION)
def test_of_retention_outputs_and_gradients_are_as_exact_as_the_reference(
    request, retain, shape, per_token, poisoned
):
    if not per_token and request.node.callspec.params["retain"] == "triton":
        pytest.skip("its kernels are given the decays of tokens")
    inputs = retention_inputs(*shape, per_token=per_token)
    assert_agrees(retain, retention_reference.retention_segment, **inputs)


@pytest.mark.parametrize("rate", [-torch.inf, torch.finfo(torch.float32).min / 2, 0.1], ids=str)
def test_of_retention_all_may_be_forgotten_and_memory_may_grow(retain, rate):
    inputs = retention_inputs(2, 40, 2, 1, 2, 4, 3, per_token=True)
    with torch.no_grad():
        inputs["log_decay"][:, 20, 0] = inputs["log_decay"][1, 39, 1] = rate
    assert_agrees(retain, retention_reference.retention_segment, **inputs)


def test_of_retention_without_decay_all_is_left(retain):
    k, v = torch.randn(2, 7, 1, 4), torch.randn(2, 7, 2, 3)
    added, left = retain(k, v)
    assert torch.equal(left, torch.ones(2, 2)) and torch.equal(added, retain(k, v, torch.zeros(2))[0])


@pytest.mark.parametrize("shape", SELECTIVE_SCAN.values(), ids=SELECTIVE_SCAN)
def test_of_the_scan_outputs_and_gradients_are_as_exact_as_the_reference(scan, shape, poisoned):
    assert_agrees(scan, scan_reference.selective_scan_segment, **scan_inputs(*shape))


def test_of_the_scan_what_is_optional_can_be_left_out(scan):
    bare = scan_inputs(2, 20, 5, 3)
    bare["dt"] = bare["dt"].detach().abs().requires_grad_()
    assert_agrees(scan, scan_reference.selective_scan_segment, **bare | dict(dt_bias=None, dt_softplus=False))


def test_of_the_scan_parts_that_run_at_once_make_a_whole(scan, poisoned):
    """In C++ two, of 288 tokens and the rest."""
    inputs = scan_inputs(1, 560, 3, 2)
    inputs["a"] = (inputs["a"].detach() * 0.02).requires_grad_()  # so that the first tokens are seen
    assert_agrees(scan, scan_reference.selective_scan_segment, **inputs)


@pytest.mark.parametrize("op", ["retention", "selective_scan"])
def test_16_bit_inputs_are_computed_in_float32(op):
    """But for products of bfloat16 where the processor itself has them."""
    inputs = retention_inputs(2, 20, 2, 1, 2, 4, 3) if op == "retention" else scan_inputs(2, 40, 5, 3)
    segment = retention_segment if op == "retention" else selective_scan_segment
    halves = ("k", "v", "x", "dt", "b")
    for backend in TABLES[segment.__name__]:
        if backend == "triton" or why_not(segment.__name__, backend, torch.bfloat16):
            continue
        short = {name: u.detach().bfloat16() if name in halves else u for name, u in inputs.items()}
        full = {name: u.float() if name in halves else u for name, u in short.items()}
        for got, want in zip(segment(**short, backend=backend), segment(**full, backend=backend)):
            products = multiplied(torch.bfloat16) if op == "retention" and backend == "cpp" else None
            same = Errors.of(got, want.double(), want, products).agree if products else torch.equal(got, want)
            assert got.dtype == torch.float32 and same


def retention_back_reference(q, grad_o, log_decay, scale):
    """By autograd."""
    (B, T, _, K), (H, V) = q.shape, grad_o.shape[2:]
    state = q.new_zeros(B, H, K, V, requires_grad=True)
    nothing = q.new_zeros(B, T, H, K), q.new_zeros(B, T, H, V)
    o = retention_reference.retention(q, *nothing, log_decay, scale=scale, initial_state=state)
    return torch.autograd.grad(o, state, grad_o)[0]


@pytest.mark.parametrize("backend", TABLES["retention_segment"])
@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
@pytest.mark.parametrize("heads", [(4, 4), (2, 4), (1, 1)], ids=str)
def test_of_retention_what_it_adds_to_the_gradient_that_enters(heads, per_token, backend, poisoned):
    if why := why_not("retention_segment", backend):
        pytest.skip(why)
    (Hq, H), T = heads, 35 if backend == "triton" else 70  # two chunks and a part
    inputs = dict(q=torch.randn(2, T, Hq, 5), grad_o=torch.randn(2, T, H, 3))
    inputs |= dict(log_decay=-0.1 * torch.rand(*((2, T, H) if per_token else (H,))), scale=0.7)

    def op(q, grad_o, log_decay, scale):
        arguments = (placed(u, backend) for u in (q, grad_o, log_decay))
        return torch.ops.lcikernels.retention_segment_back(*arguments, scale, backend).cpu()

    assert_agrees(op, retention_back_reference, **inputs)


def scan_back_reference(grad_y, dt, a, c, z, dt_bias, dt_softplus):
    """By autograd."""
    state = dt.new_zeros(dt.shape[0], *a.shape, requires_grad=True)
    options = dict(z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=state)
    y = scan_reference.selective_scan(torch.zeros_like(dt), dt, a, c, c, **options)
    return torch.autograd.grad(y, state, grad_y)[0]


def scan_back_inputs(B, T, D, N, G=None):
    inputs = {name: u for name, u in scan_inputs(B, T, D, N, G).items() if name != "x"}
    inputs = {name: u.detach() if isinstance(u, torch.Tensor) else u for name, u in inputs.items()}
    c = inputs.pop("b")
    return dict(grad_y=torch.randn(B, T, D)) | inputs | dict(c=c, z=torch.randn(B, T, D))


def scan_back(backend):
    def op(grad_y, dt, a, c, z, dt_bias, dt_softplus):
        arguments = (placed(u, backend) for u in (grad_y, dt, a, c, z, dt_bias))
        return torch.ops.lcikernels.selective_scan_segment_back(*arguments, dt_softplus, backend).cpu()

    return op


@pytest.mark.parametrize("backend", TABLES["selective_scan_segment"])
@pytest.mark.parametrize("missing", [None, "z", "dt_bias"])
def test_of_the_scan_what_it_adds_to_the_gradient_that_enters(missing, backend, poisoned):
    if why := why_not("selective_scan_segment", backend):
        pytest.skip(why)
    T = 5 if backend == "triton" else 18
    inputs = scan_back_inputs(1, T, 6, 3, 2) | ({missing: None} if missing else {})
    assert_agrees(scan_back(backend), scan_back_reference, **inputs)


def test_of_the_scan_gradients_that_cross_parts(poisoned):
    inputs = scan_back_inputs(1, 560, 3, 2)
    inputs["a"] *= 0.02
    best = choose("selective_scan_segment", None, inputs["dt"])
    assert_agrees(scan_back(best), scan_back_reference, **inputs)


@pytest.mark.parametrize("shape", [(1, 40, 1, 1, 24, 8, 8), (1, 70, 1, 1, 2, 29, 100)], ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
def test_of_retention_on_every_instruction_set(instruction_set, shape, per_token, poisoned):
    inputs = retention_inputs(*shape, per_token=per_token)
    cpp = partial(retention_segment, backend="cpp")
    assert_agrees(cpp, retention_reference.retention_segment, **inputs)


def test_of_the_scan_on_every_instruction_set(instruction_set, poisoned):
    cpp = partial(selective_scan_segment, backend="cpp")
    assert_agrees(cpp, scan_reference.selective_scan_segment, **scan_inputs(1, 45, 70, 11))
    assert_agrees(scan_back("cpp"), scan_back_reference, **scan_back_inputs(1, 45, 70, 11))


def test_of_the_scan_decays_of_any_size(poisoned):
    """Where exp2 has no bound, too."""
    inputs = scan_back_inputs(1, 12, 5, 3)
    inputs["a"] = inputs["a"] * 10 - 20
    for backend in TABLES["selective_scan_segment"]:
        if not why_not("selective_scan_segment", backend):
            assert_agrees(scan_back(backend), scan_back_reference, **inputs)


@pytest.fixture
def kernel():
    """The scan's in Triton."""
    if why := why_not("selective_scan_segment", "triton"):
        pytest.skip(why)
    return load("selective_scan_segment", "triton")


@pytest.mark.parametrize("shape, part", [((2, 11, 4, 3, 2), 8), ((1, 9, 5, 4, None), 64)], ids=str)
def test_of_the_scan_in_triton_parts_make_a_whole(kernel, shape, part, monkeypatch, poisoned):
    """Nothing is differentiated: that is the whole scan's."""
    monkeypatch.setattr(kernel, "cut", lambda *_: part)
    monkeypatch.setattr(kernel, "CHUNK", 8)
    inputs = scan_inputs(*shape)
    frozen = {name: u.detach() if isinstance(u, torch.Tensor) else u for name, u in inputs.items()}
    op = on_device(selective_scan_segment, "triton")
    assert_agrees(op, scan_reference.selective_scan_segment, **frozen)
    assert_agrees(scan_back("triton"), scan_back_reference, **scan_back_inputs(*shape))


def test_of_the_scan_in_triton_gradients(kernel, poisoned):
    op = on_device(selective_scan_segment, "triton")
    assert_agrees(op, scan_reference.selective_scan_segment, **scan_inputs(1, 3, 4, 2))


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
def test_of_retention_in_triton_parts_make_a_whole(per_token, monkeypatch, poisoned):
    if why := why_not("retention_segment", "triton"):
        pytest.skip(why)
    monkeypatch.setattr(import_module("lcikernels.ops.retention.launch"), "segment", lambda *_: 32)
    inputs = retention_inputs(2, 70, 2, 1, 2, 5, 3, per_token=per_token)
    op = on_device(retention_segment, "triton")
    assert_agrees(op, retention_reference.retention_segment, **inputs)


def part_of_more(x):
    """The second half of a projection's outputs, without its first token."""
    wide = x.new_full((x.shape[0], x.shape[1] + 1, *x.shape[2:-1], 2 * x.shape[-1]), torch.nan)
    view = wide[:, 1:, ..., x.shape[-1] :]
    return view.copy_(x)


SEGMENTS = [name for name in TABLES if name.endswith("_segment")]
LAYOUTS = {"parts first": (part_of_more, along_tokens), "parts last": (along_tokens, part_of_more)}


def segment_ops(name, layouts, backend):
    """The three, with arguments that lie so, as pairs."""
    first, second = layouts
    if name == "retention_segment":
        k, v, rates = first(torch.randn(2, 20, 2, 4)), second(torch.randn(2, 20, 4, 3)), -torch.rand(2, 20, 4)
        back = (k, v, rates, torch.randn(2, 4, 4, 3), torch.randn(2, 4))
        arguments = (k, v, rates, backend), (k, v, rates, 0.5, backend), back
    else:
        x, dt, z = first(torch.randn(2, 3, 6)), second(torch.randn(2, 3, 6)), first(torch.randn(2, 3, 6))
        a, b, bias = -torch.rand(6, 3), second(torch.randn(2, 3, 2, 3)), torch.randn(6)
        inputs, grads = (x, dt, a, b, bias, True), (torch.randn(2, 6, 3), torch.randn(2, 6, 3))
        arguments = (*inputs, backend), (x, dt, a, b, z, bias, True, backend), (*inputs, *grads, backend)
    for end, given in zip(("", "_back", "_backward"), arguments):
        given = [placed(u, backend) if isinstance(u, torch.Tensor) else u for u in given]
        yield getattr(torch.ops.lcikernels, name + end), given


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name, backend", [(name, backend) for name in SEGMENTS for backend in TABLES[name]])
def test_views_are_read_as_copies_are_and_gradients_lie_as_fakes_do(name, backend, layouts, poisoned):
    if why := why_not(name, backend):
        pytest.skip(why)
    for op, given in segment_ops(name, layouts, backend):
        torch.library.opcheck(op, tuple(given), test_utils="test_faketensor")
        if op.__name__ == name + "_back":  # test_layouts.py has the others
            copies = [u.contiguous() if isinstance(u, torch.Tensor) else u for u in given]
            torch.testing.assert_close(op(*given), op(*copies))


@pytest.mark.parametrize("layout", [along_tokens, part_of_more])
def test_of_retention_gradients_of_what_is_left_alone_lie_as_fakes_do(layout):
    k, v, rates = layout(torch.randn(2, 5, 2, 4)), layout(torch.randn(2, 5, 4, 3)), -torch.rand(2, 5, 4)
    op = torch.ops.lcikernels.retention_segment_backward
    torch.library.opcheck(op, (k, v, rates, None, torch.randn(2, 4)), test_utils="test_faketensor")


def test_gradcheck():
    for op, inputs in (
        (retention_segment, retention_inputs(1, 6, 2, 1, 2, 2, 2, per_token=True, dtype=torch.float64)),
        (selective_scan_segment, scan_inputs(1, 6, 4, 2, 2, dtype=torch.float64)),
    ):
        leaves = {name: u for name, u in inputs.items() if isinstance(u, torch.Tensor)}
        others = {name: u for name, u in inputs.items() if name not in leaves}

        def run(*values, op=op, names=tuple(leaves), others=others):
            return op(**dict(zip(names, values)), **others)

        assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)
