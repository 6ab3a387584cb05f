"""Triton's kernels on tensors as callers have them: parts of projections, and [B, D, T] memory."""

import pytest
import torch
from devices import on_device, placed, why_not
from layouts import along_tokens, dense, half
from memory import without_launches
from ops import test_causal_conv1d_triton, test_retention_triton, test_selective_scan
from tolerance import assert_agrees
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lcikernels import causal_conv1d, retention, retention_step, selective_scan
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as conv_reference
from lcikernels.ops.checks import channels_first
from lcikernels.ops.retention.reference import retention as retention_reference
from lcikernels.ops.selective_scan.reference import selective_scan as scan_reference

if why := why_not("selective_scan", "triton"):
    pytest.skip(why, allow_module_level=True)

from lcikernels.ops.causal_conv1d import kernel as conv_kernel
from lcikernels.ops.retention import kernel as retention_kernel
from lcikernels.ops.retention import launch as retention_launch
from lcikernels.ops.selective_scan import kernel as scan_kernel

OPS = torch.ops.lcikernels


def rows_inside(x: Tensor) -> Tensor:
    """[B, T, D] of memory that is [D, B, T], as mamba_ssm's in_proj makes it."""
    return dense(x.permute(2, 0, 1)).permute(1, 2, 0)


def fifth(x: Tensor) -> Tensor:
    """Of five parts the last: further apart than a kernel is compiled for."""
    return torch.cat((*[torch.full_like(x, torch.nan)] * 4, x), -1)[..., -x.shape[-1] :]


def in_rows_of_more(x: Tensor) -> Tensor:
    """All tokens but one: rows are not as far apart as T tokens."""
    return torch.cat((torch.full_like(x[:, :1], torch.nan), x), 1)[:, 1:]


def laid(op, layouts: dict):
    """`op` of arguments that lie so."""

    def run(**arguments):
        there = {name: placed(x, "triton") for name, x in arguments.items()}
        views = {name: make(there[name]) for name, make in layouts.items()}
        out = op(**there | views, backend="triton")
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    return run


# Layouts and groups.
SCANS = {
    "all along tokens": (dict.fromkeys(("x", "dt", "z", "b", "c"), along_tokens), 1),
    "as transformers' Mamba": (dict(x=half, z=half, dt=along_tokens, b=half, c=fifth), None),
    "mamba_ssm's z, rows of more, parts of less": (
        dict(x=fifth, dt=in_rows_of_more, z=rows_inside, b=in_rows_of_more, c=along_tokens),
        None,
    ),
}


@pytest.mark.parametrize("layouts, groups", SCANS.values(), ids=SCANS)
def test_the_scan_of_any_layout_is_as_exact_as_the_reference(layouts, groups, poisoned):
    arguments = test_selective_scan.inputs(2, 3, 4, 2, groups)
    assert_agrees(laid(selective_scan, layouts), scan_reference, **arguments)


# A run of 16 tokens and a part of one; filters unrolled or not. test_layouts.py has other views.
CONVOLUTIONS = [(rows_inside, 1, 19, 3), (along_tokens, 2, 3, 2), (along_tokens, 2, 5, 6)]


@pytest.mark.parametrize("layout, B, T, W", CONVOLUTIONS)
def test_the_convolution_of_any_layout_is_as_exact_as_the_reference(layout, B, T, W, poisoned):
    arguments = test_causal_conv1d_triton.inputs(B, T, 5, W)
    assert_agrees(laid(causal_conv1d, {"x": layout}), conv_reference, **arguments)


def test_packed_sequences_along_tokens_are_cut_at_tiles_too(poisoned):
    bounds = (0, 0, 2, 17, 34)  # no token; two; a tile, and one that has none; a tile and a token
    packed = test_causal_conv1d_triton.inputs(1, bounds[-1], 3, 4, N=len(bounds) - 1)
    packed["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    assert_agrees(laid(causal_conv1d, {"x": along_tokens}), conv_reference, **packed)


def test_the_convolution_along_tokens_in_16_bits(poisoned):
    arguments = test_causal_conv1d_triton.inputs(1, 17, 3, 4, dtype=torch.bfloat16)
    assert_agrees(laid(causal_conv1d, {"x": along_tokens}), conv_reference, **arguments)


def heads_first(x: Tensor) -> Tensor:
    """[B, T, H, K] of memory that is [B, H, T, K]."""
    return dense(x.transpose(1, 2)).transpose(1, 2)


def all_heads_at_once(x: Tensor) -> Tensor:
    """The heads in a row of a wider projection: from token to token is no whole number of heads."""
    rows = x.flatten(2)
    return torch.cat((torch.full_like(rows[..., :3], torch.nan), rows), -1)[..., 3:].unflatten(
        -1, x.shape[2:]
    )


RETENTIONS = {
    "heads of a row, parts of projections": dict(q=all_heads_at_once, k=fifth, v=half),
    "along tokens, rows of more, heads first": dict(q=along_tokens, k=in_rows_of_more, v=heads_first),
}


@pytest.mark.parametrize("layouts", RETENTIONS.values(), ids=RETENTIONS)
def test_retention_of_any_layout_is_as_exact_as_the_reference(layouts, poisoned):
    arguments = test_retention_triton.inputs(2, 17, 2, 1, 2, 5, 7)
    assert_agrees(laid(retention, layouts), retention_reference, **arguments)


def test_retention_token_by_token_of_any_layout_is_as_exact_as_the_reference(poisoned):
    layouts = dict(q=along_tokens, k=fifth, v=heads_first)
    arguments = test_retention_triton.inputs(2, 3, 2, 1, 2, 5, 7)
    assert_agrees(laid(retention, layouts), retention_reference, **arguments)


def test_a_step_of_retention_reads_parts_of_projections():
    whole = test_retention_triton.without_gradients(test_retention_triton.inputs(2, 1, 2, 1, 2, 5, 7))
    q, k, v, rate = (whole[name][:, 0] for name in ("q", "k", "v", "log_decay"))
    step, state = on_device(retention_step, "triton"), whole["initial_state"].clone()
    o = step(half(q), fifth(k), half(v), rate, state=state)
    same = whole["initial_state"].clone()
    assert torch.equal(o, step(q, k, v, rate, state=same)) and torch.equal(state, same)


def scan_arguments(grad, state, layouts) -> list:
    x, dt, z = (make(torch.randn(2, 3, 6)) for make in layouts[:3])
    b, c = (make(torch.randn(2, 3, 2, 3)) for make in layouts[3:])
    rest = torch.randn(6), z, torch.randn(6), True, state, None
    return [grad, torch.randn(2, 6, 3), x, dt, -torch.rand(6, 3), b, c, *rest, torch.randn(1, 6, 3), 64]


# Of grad_y, of the state, of x, dt, z, b, c.
ORDERS = {
    "all along tokens": (along_tokens, along_tokens, (along_tokens,) * 5),
    "x and b": (dense, along_tokens, (along_tokens, dense, half, along_tokens, dense)),
    "dt, z and c": (along_tokens, dense, (half, along_tokens, rows_inside, half, along_tokens)),
}


@pytest.mark.parametrize("grad, states, layouts", ORDERS.values(), ids=ORDERS)
def test_what_the_scan_returns_lies_as_the_tensor_it_belongs_to(grad, states, layouts):
    back = scan_arguments(grad(torch.randn(2, 3, 6)), states(torch.randn(2, 6, 3)), layouts)
    back = [placed(u, "triton") for u in back]
    forth = (*back[2:13], 64, "triton")
    check_fakes(OPS.selective_scan, forth)
    check_fakes(OPS.selective_scan_backward, (*back, "triton"))
    y = OPS.selective_scan(*forth)[0]
    assert channels_first(y) == channels_first(back[2])


def check_fakes(op, arguments):
    torch.library.opcheck(op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout, grad, W", [(along_tokens, dense, 4), (half, along_tokens, 6)])
def test_what_the_convolution_returns_lies_as_x(layout, grad, W):
    x, dy = (placed(make(torch.randn(2, 5, 6)), "triton") for make in (layout, grad))
    weight, state = placed(torch.randn(6, W), "triton"), placed(torch.randn(2, 6, W - 1), "triton")
    rest = x, weight, weight[:, 0].contiguous(), "silu", state, None, "triton"
    check_fakes(OPS.causal_conv1d, rest)
    check_fakes(OPS.causal_conv1d_backward, (dy, state, *rest))
    assert channels_first(OPS.causal_conv1d(*rest)[0]) == channels_first(x)


class Copied(TorchDispatchMode):
    """Elements of what torch copies."""

    def __init__(self):
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        if function._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat"):
            self.elements.append(out.numel())
        return out


def on_meta(make, *shape):
    return make(torch.empty(*shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("make", [along_tokens, rows_inside, half])
def test_torch_copies_no_tokens_for_the_kernels(make, monkeypatch):
    for kernel in (conv_kernel, scan_kernel, retention_launch):
        if hasattr(kernel, "device"):
            without_launches(monkeypatch, kernel, 132, 90)
    monkeypatch.setattr(conv_kernel, "forward_kernel", scan_kernel.forward_kernel)
    monkeypatch.setattr(conv_kernel, "backward_kernel", scan_kernel.backward_kernel)
    B, T, D, N, H, K = 2, 512, 256, 16, 4, 64
    with torch.device("meta"):
        x, dt, z, dy = (on_meta(make, B, T, D) for _ in range(4))
        b, c = (on_meta(make, B, T, N) for _ in range(2))
        q, do = (make(torch.empty(B, T, H * K)).unflatten(-1, (H, K)) for _ in range(2))
        weight, a, d = torch.empty(D, 4), torch.empty(D, N), torch.empty(D)
        with Copied() as copied:
            conv_kernel.forward(x, weight, None, "silu", None, None)
            conv_kernel.backward(dy, None, x, weight, None, "silu", None, None)
            inputs = x, dt, a, b, c, d, z, d, True, None, None
            _, _, checkpoints = scan_kernel.forward(*inputs, scan_kernel.CHUNK)
            scan_kernel.backward(dy, None, *inputs, checkpoints, scan_kernel.CHUNK)
            retention_kernel.forward(q, q, q, torch.empty(H), 0.5, None, None)
            retention_kernel.backward(do, None, q, q, q, torch.empty(H), 0.5, None, None, False)
    assert max(copied.elements) < B * T * N
