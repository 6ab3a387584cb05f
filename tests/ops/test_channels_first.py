"""Tensors as the callers of mamba-ssm and transformers hand them: [B, D, L] as .mT, chunks, slices.

Read where they lie; outputs and gradients lie as the tensors they belong to.
"""

import pytest
import torch
from devices import on_device, why_not
from layouts import along_tokens, half
from tolerance import assert_agrees
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lcikernels import causal_conv1d, extension, retention, selective_scan
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as convolution_reference
from lcikernels.ops.checks import empty_as
from lcikernels.ops.retention.reference import retention as retention_reference
from lcikernels.ops.selective_scan.op import CHECKPOINT_EVERY
from lcikernels.ops.selective_scan.reference import selective_scan as scan_reference

compiled = pytest.mark.skipif(extension.WHY_NOT is not None, reason=str(extension.WHY_NOT))


def turned_chunk(x: Tensor) -> Tensor:
    """The second half of [B, 2 D, T]."""
    x = x.movedim(1, -1)
    return torch.cat([torch.full_like(x, torch.nan), x], 1).chunk(2, 1)[1].movedim(-1, 1)


def turned_and_late(x: Tensor) -> Tensor:
    """From the fourth token of longer rows on."""
    x = x.movedim(1, -1)
    return torch.cat([x.new_full((*x.shape[:-1], 3), torch.nan), x], -1)[..., 3:].movedim(-1, 1)


def every_other(x: Tensor) -> Tensor:
    """Neither tokens nor channels side by side: it is copied."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


# how x, dt, z, b, c and what y hands back lie
SCAN = {
    "as we have them": {},
    "all [B, D, L]": dict.fromkeys(["x", "dt", "z", "b", "c", "y"], along_tokens),
    "z a chunk, b and c slices, of [B, ., L]": dict(
        x=turned_and_late, dt=along_tokens, z=turned_chunk, b=turned_chunk, c=turned_chunk, y=along_tokens
    ),
    "transformers' Mamba": dict(x=half, z=half, dt=along_tokens, b=half, c=half),
    "x alone [B, D, L]": dict(x=along_tokens),
    "dt and z alone": dict(dt=turned_and_late, z=along_tokens),
    "b alone": dict(b=along_tokens),
    "the gradient of y alone": dict(y=along_tokens),
    "every other of all": dict.fromkeys(["x", "dt", "z", "b", "c"], every_other),
}
CONVOLUTION = {
    "as we have them": {},
    "all [B, D, L]": dict(x=along_tokens, y=along_tokens),
    "x a chunk of [B, ., L]": dict(x=turned_chunk),
    "late tokens": dict(x=turned_and_late, y=along_tokens),
    "half of a projection": dict(x=half),
    "half of a projection, the gradient of y [B, D, L]": dict(x=half, y=along_tokens),
    "every other": dict(x=every_other),
}
# B, T, D, N, G: a vector is 16, 8 or 4 channels, a chunk 32 tokens; a task has 256 channels at most
SCAN_SHAPES = {
    "odd everything": (2, 37, 21, 5, 3),
    "a vector and one": (1, 70, 17, 16, 1),
    "several tasks": (1, 33, 300, 4, 1),
    "parts of a sequence at once": (1, 1100, 6, 3, 2),
    "one token": (2, 1, 5, 3, 1),
    "one channel": (2, 40, 1, 2, 1),
}
SCAN_BOUNDS = (0, 0, 7, 39, 64, 64, 100, 101)
# B, T, D, W: a segment is 256 tokens, a block 512 channels
CONVOLUTION_SHAPES = {
    "odd everything": (2, 37, 21, 4),
    "a segment and one": (1, 257, 17, 4),
    "two blocks": (1, 20, 515, 3),
    "two taps": (2, 35, 18, 2),
    "one tap": (1, 35, 18, 1),
    "nine taps over two segments": (1, 300, 19, 9),
    "shorter than the filter": (2, 2, 3, 4),
    "one channel": (2, 40, 1, 4),
    "the filter reaches back three segments": (1, 520, 2, 600),
}
CONVOLUTION_BOUNDS = (0, 0, 2, 3, 255, 256, 257, 257, 300, 300)


def scan_inputs(B, T, D, N, G, dtype=torch.float32, S=None):
    exact = torch.promote_types(dtype, torch.float32)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape).to(dtype).requires_grad_()

    a = (-3 * torch.rand(D, N, dtype=exact)).requires_grad_()
    tokens = dict(x=random(B, T, D), dt=random(B, T, D), a=a, b=random(B, T, G, N), c=random(B, T, G, N))
    parameters = dict(d=random(D, dtype=exact), z=random(B, T, D), dt_bias=random(D, dtype=exact))
    return tokens | parameters | dict(initial_state=random(S or B, D, N, dtype=exact))


def convolution_inputs(B, T, D, W, dtype=torch.float32, S=None):
    exact = torch.promote_types(dtype, torch.float32)
    x = torch.randn(B, T, D).to(dtype).requires_grad_()
    parameters = dict(weight=torch.randn(D, W, dtype=exact), bias=torch.randn(D, dtype=exact))
    if W > 1:
        parameters["initial_state"] = torch.randn(S or B, D, W - 1, dtype=exact)
    return dict(x=x) | {name: u.requires_grad_() for name, u in parameters.items()}


def laid(tensors: dict[str, Tensor], layout: dict) -> dict[str, Tensor]:
    return {name: layout.get(name, lambda x: x)(x) for name, x in tensors.items()}


def by(op, layout, **options):
    """`op` of its arguments as they lie in `layout`. Where y's gradient comes as [B, D, L], so is y."""

    def run(**inputs):
        y, state = op(**laid(inputs, layout), **options, return_final_state=True)
        y = y.mT.clone() if "y" in layout else y
        return (y, state) if state.numel() else y

    return run


def scan(backend):
    if why := why_not("selective_scan", backend):
        pytest.skip(why)
    return on_device(selective_scan, backend)


def convolution(backend):
    if why := why_not("causal_conv1d", backend):
        pytest.skip(why)
    return on_device(causal_conv1d, backend)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", SCAN.values(), ids=SCAN)
def test_a_scan_of_any_layout_is_as_exact_as_the_reference(layout, dtype, backend, poisoned):
    inputs = scan_inputs(*SCAN_SHAPES["odd everything"], dtype=dtype)
    reference = by(scan_reference, {"y": layout["y"]} if "y" in layout else {}, dt_softplus=True)
    assert_agrees(by(scan(backend), layout, dt_softplus=True), reference, **inputs)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", CONVOLUTION.values(), ids=CONVOLUTION)
def test_a_convolution_of_any_layout_is_as_exact_as_the_reference(layout, dtype, backend, poisoned):
    inputs = convolution_inputs(*CONVOLUTION_SHAPES["odd everything"], dtype=dtype)
    reference = by(convolution_reference, {"y": layout["y"]} if "y" in layout else {}, activation="silu")
    assert_agrees(by(convolution(backend), layout, activation="silu"), reference, **inputs)


@compiled
@pytest.mark.parametrize("shape", CONVOLUTION_SHAPES.values(), ids=CONVOLUTION_SHAPES)
def test_lanes_of_tokens_are_as_exact_as_the_reference(instruction_set, shape, poisoned):
    check_lanes_of_tokens(convolution_inputs(*shape))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_lanes_of_tokens_in_other_dtypes_are_as_exact_as_the_reference(instruction_set, dtype, poisoned):
    for shape in "a segment and one", "nine taps over two segments":
        check_lanes_of_tokens(convolution_inputs(*CONVOLUTION_SHAPES[shape], dtype=dtype))


def check_lanes_of_tokens(inputs):
    op = by(convolution("cpp"), dict(x=along_tokens, y=along_tokens), activation="silu")
    assert_agrees(op, by(convolution_reference, {"y": along_tokens}, activation="silu"), **inputs)


@compiled
def test_gradients_of_projections_from_several_tasks_are_as_exact_as_the_reference(instruction_set, poisoned):
    op = by(scan("cpp"), SCAN["all [B, D, L]"], dt_softplus=True)
    reference = by(scan_reference, {"y": along_tokens}, dt_softplus=True)
    assert_agrees(op, reference, **scan_inputs(*SCAN_SHAPES["several tasks"]))


@compiled
@pytest.mark.parametrize("layout", ["all [B, D, L]", "half of a projection, the gradient of y [B, D, L]"])
def test_packed_sequences_of_tokens_in_lanes_do_not_see_each_other(instruction_set, layout, poisoned):
    bounds = torch.tensor(CONVOLUTION_BOUNDS, dtype=torch.int32)
    options = dict(activation="silu", cu_seqlens=bounds)
    inputs = convolution_inputs(1, CONVOLUTION_BOUNDS[-1], 18, 4, S=len(bounds) - 1)
    op = by(convolution("cpp"), CONVOLUTION[layout], **options)
    assert_agrees(op, by(convolution_reference, {"y": along_tokens}, **options), **inputs)


def results(op, inputs: dict[str, Tensor], layout: dict, options: dict) -> dict[str, Tensor]:
    """Outputs, and gradients of views that lie in `layout`, which must lie likewise."""
    views = {name: x.detach().requires_grad_() for name, x in laid(inputs, layout).items()}
    y, state = op(**views, **options, return_final_state=True)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(u.shape, generator=generator).to(u.dtype) for u in (y, state)]
    incoming[0] = layout.get("y", lambda x: x)(incoming[0])
    grads = dict(zip(views, torch.autograd.grad([y, state], list(views.values()), incoming)))
    assert y.stride() == empty_as(views["x"]).stride()
    for name in {"x", "dt", "z", "b", "c"} & views.keys():
        assert grads[name].stride() == empty_as(views[name]).stride(), name
    return dict(y=y, state=state) | grads


def same_bits(got: dict[str, Tensor], want: dict[str, Tensor], but: set[str] = frozenset()):
    """But for sums in another order, which are compared with the reference above."""
    for name in want.keys() - but:
        assert torch.equal(got[name], want[name]), name


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_scan_has_the_bits_of_a_copy(instruction_set, dtype, poisoned):
    op, options = scan("cpp"), dict(dt_softplus=True)
    for shape in SCAN_SHAPES.values():
        inputs = scan_inputs(*shape, dtype=dtype)
        want = results(op, inputs, {}, options)
        # Layers of the gradients of b and c are summed by torch, in an order of its own.
        summed = {"b", "c"} if shape[2] > 32 else set()
        for layout in SCAN.values():
            same_bits(results(op, inputs, layout, options), want, summed)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_scan_has_the_bits_of_a_copy(instruction_set, dtype, poisoned):
    options = dict(dt_softplus=True, cu_seqlens=torch.tensor(SCAN_BOUNDS, dtype=torch.int32))
    inputs = scan_inputs(1, SCAN_BOUNDS[-1], 21, 5, 3, S=len(SCAN_BOUNDS) - 1, dtype=dtype)
    want = results(scan("cpp"), inputs, {}, options)
    for layout in SCAN.values():
        same_bits(results(scan("cpp"), inputs, layout, options), want)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_convolution_has_the_bits_of_a_copy(instruction_set, dtype, poisoned):
    op, options = convolution("cpp"), dict(activation="silu")
    for shape in CONVOLUTION_SHAPES.values():
        inputs = convolution_inputs(*shape, dtype=dtype)
        want = results(op, inputs, {}, options)
        for layout in CONVOLUTION.values():
            through_lanes = {"weight", "bias"} if {*layout.values()} - {half} else set()  # sums over tokens
            same_bits(results(op, inputs, layout, options), want, through_lanes)


class Copies(TorchDispatchMode):
    """What torch is asked to copy."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("clone", "copy", "contiguous")):
            self.seen.append((str(function), tuple(args[0].shape)))
        return function(*args, **(kwargs or {}))


def heads_of_one_projection(B=2, T=70, H=3, K=5, V=7):
    """q, k, v: slices of [B, T, H, 2 K + V]."""
    return torch.randn(B, T, H, 2 * K + V).split([K, K, V], -1)


@compiled
def test_nothing_is_copied(instruction_set):
    inputs = {name: x.detach() for name, x in scan_inputs(*SCAN_SHAPES["odd everything"]).items()}
    tokens = {"x", "dt", "z", "b", "c"}
    arguments = "x dt a b c d z dt_bias"
    for layout in (
        SCAN["all [B, D, L]"],
        SCAN["transformers' Mamba"],
        SCAN["z a chunk, b and c slices, of [B, ., L]"],
    ):
        views = {name: x if name in tokens else inputs[name] for name, x in laid(inputs, layout).items()}
        views = [views[name] for name in arguments.split()]
        dy = layout.get("y", half)(torch.randn(2, 37, 21))
        ops = torch.ops.lcikernels
        with Copies() as copies:
            *_, kept = ops.selective_scan(*views, True, None, None, CHECKPOINT_EVERY["cpp"], "cpp")
            every = CHECKPOINT_EVERY["cpp"]
            ops.selective_scan_backward(dy, None, *views, True, None, None, kept, every, "cpp")
        assert copies.seen == []
    weight, bias = torch.randn(21, 4), torch.randn(21)
    for layout in (along_tokens, turned_chunk, turned_and_late, half):
        x, dy = layout(torch.randn(2, 37, 21)), along_tokens(torch.randn(2, 37, 21))
        with Copies() as copies:
            ops.causal_conv1d(x, weight, bias, "silu", None, None, "cpp")
            ops.causal_conv1d_backward(dy, None, x, weight, bias, "silu", None, None, "cpp")
        assert copies.seen == []
    q, k, v = heads_of_one_projection()
    rates = -torch.rand(3)
    with Copies() as copies:
        ops.retention(q, k, v, rates, 0.5, None, None, "cpp")
        ops.retention_backward(
            half(torch.randn(2, 70, 3, 7)), None, q, k, v, rates, 0.5, None, None, True, "cpp"
        )
    assert copies.seen == []


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_retention_reads_heads_of_one_projection(instruction_set, dtype, poisoned):
    q, k, v = (x.to(dtype) for x in heads_of_one_projection())
    wide = torch.cat([q, k, v], -1)
    grad = half(torch.randn(2, 70, 3, 7).to(dtype))
    rates = -torch.rand(2, 70, 3, dtype=torch.promote_types(dtype, torch.float32))
    bounds = torch.tensor([0, 3, 70], dtype=torch.int32)

    def gradients(parts, grad, batch, **options):
        leaves = [x[batch].detach().requires_grad_() for x in parts]
        o = retention(*leaves, rates[batch], backend="cpp", **options)
        grads = torch.autograd.grad(o, leaves, grad[batch])
        assert all(x.is_contiguous() for x in (o, *grads))
        return o, *grads

    for batch, options in ((slice(0, 2), {}), (slice(1, 2), dict(cu_seqlens=bounds))):
        got = gradients(wide.split([5, 5, 7], -1), grad, batch, **options)
        for x, y in zip(got, gradients((q, k, v), grad.contiguous(), batch, **options)):
            assert torch.equal(x, y)


@compiled
def test_retention_of_heads_of_one_projection_is_as_exact_as_the_reference(poisoned):
    def of(op, **options):
        def run(wide, log_decay):
            q, k, v = wide.split([5, 5, 7], -1)
            return op(q, k, v, log_decay, **options)

        return run

    wide = torch.randn(2, 70, 3, 17, requires_grad=True)
    rates = (-torch.rand(3)).requires_grad_()
    assert_agrees(of(retention, backend="cpp"), of(retention_reference), wide=wide, log_decay=rates)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_opcheck_of_views(backend):
    def leaf(x):
        return x.detach().requires_grad_()

    scan(backend), convolution(backend)
    for layout in (SCAN[name] for name in ("all [B, D, L]", "transformers' Mamba", "dt and z alone")):
        views = {name: leaf(x) for name, x in laid(scan_inputs(2, 5, 4, 3, 2), layout).items()}
        *arguments, state = views.values()
        every = CHECKPOINT_EVERY[backend]
        torch.library.opcheck(
            torch.ops.lcikernels.selective_scan, (*arguments, True, state, None, every, backend)
        )
    for layout in (CONVOLUTION[name] for name in ("x a chunk of [B, ., L]", "half of a projection")):
        x, weight, bias, state = laid(convolution_inputs(2, 5, 4, 3), layout).values()
        arguments = *map(leaf, (x, weight, bias)), "silu", leaf(state), None, backend
        torch.library.opcheck(torch.ops.lcikernels.causal_conv1d, arguments)
