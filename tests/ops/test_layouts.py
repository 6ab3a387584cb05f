"""Every argument of every op, on every backend, as views that callers have: the same numbers as of a copy.

Gradients that come in are such views, too: of .sum() all elements are one.
"""

import pytest
import torch
from devices import able
from layouts import along_tokens, dense, half
from torch import Tensor
from torch.testing import assert_close

from lcikernels import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    kronecker_expand,
    retention,
    retention_segment,
    retention_step,
    selective_scan,
    selective_scan_segment,
    selective_scan_step,
)
from lcikernels.backends import TABLES


def reversed_axes(x: Tensor) -> Tensor:
    """As .mT of all of it."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def channels_first(x: Tensor) -> Tensor:
    """[B, T, ...] of memory that is [B, ..., T]."""
    return along_tokens(x) if x.dim() > 2 else reversed_axes(x)


def part(x: Tensor) -> Tensor:
    """The second of two, on each axis but the last, where it is every other one: an offset and steps."""
    wide = x.new_full([2 * n + 1 for n in x.shape], torch.nan)
    view = wide[tuple(slice(n + 1, None) for n in x.shape[:-1])][..., 1::2]
    view.copy_(x)
    return view


def expanded(x: Tensor) -> Tensor:
    """One element for all of them."""
    return x[(slice(0, 1),) * x.dim()].expand_as(x)


VIEWS = {f.__name__: f for f in (reversed_axes, channels_first, part, half, expanded)}


def random(*shape):
    return torch.randn(*shape)


def rate(*shape):
    return -torch.rand(*shape)


B, T, D, G, N, H, K, V, W = 2, 3, 6, 2, 3, 2, 3, 4, 3
SEQUENCES = {
    "retention": (
        retention,
        dict(q=random(B, T, H, K), k=random(B, T, 1, K), v=random(B, T, H, V), log_decay=rate(B, T, H)),
        dict(initial_state=random(B, H, K, V), return_final_state=True),
    ),
    "retention, rates of heads": (
        retention,
        dict(q=random(B, 18, H, K), k=random(B, 18, H, K), v=random(B, 18, 1, V), log_decay=rate(H)),
        dict(return_final_state=True),
    ),
    "selective_scan": (
        selective_scan,
        dict(x=random(B, T, D), dt=random(B, T, D), a=rate(D, N), b=random(B, T, G, N), c=random(B, T, G, N))
        | dict(d=random(D), z=random(B, T, D), dt_bias=random(D), initial_state=random(B, D, N)),
        dict(dt_softplus=True, return_final_state=True),
    ),
    "retention_segment": (
        retention_segment,
        dict(k=random(B, T, 1, K), v=random(B, T, H, V), log_decay=rate(B, T, H)),
        {},
    ),
    "selective_scan_segment": (
        selective_scan_segment,
        dict(x=random(B, T, D), dt=random(B, T, D), a=rate(D, N), b=random(B, T, G, N), dt_bias=random(D)),
        dict(dt_softplus=True),
    ),
    "causal_conv1d": (
        causal_conv1d,
        dict(x=random(B, T, D), weight=random(D, W), bias=random(D), initial_state=random(B, D, W - 1)),
        dict(activation="silu", return_final_state=True),
    ),
    "causal_conv1d, many taps": (
        causal_conv1d,
        dict(x=random(B, T, D), weight=random(D, 6), bias=random(D), initial_state=random(B, D, 5)),
        dict(activation="silu", return_final_state=True),
    ),
    "gated_rms_norm": (
        gated_rms_norm,
        dict(x=random(B, T, D), gate=random(B, T, D), weight=random(D), bias=random(D)),
        {},
    ),
    "gated_rms_norm, the gate first": (
        gated_rms_norm,
        dict(x=random(B, T, D), gate=random(B, T, D), weight=random(D), bias=random(D)),
        dict(norm_before_gate=False, groups=2, kind="layer"),
    ),
    "kronecker_expand": (
        kronecker_expand,
        dict(weight=random(2, 4, 3), write=random(5, 4), read=random(6, 3), depth=random(3, 2)),
        {},
    ),
    "kronecker_expand, maps of each layer": (
        kronecker_expand,
        dict(weight=random(2, 4, 3), write=random(2, 5, 4), read=random(2, 6, 3)),
        {},
    ),
}
STEPS = {
    "retention_step": (
        retention_step,
        dict(q=random(B, H, K), k=random(B, 1, K), v=random(B, H, V), log_decay=rate(B, H)),
        random(B, H, K, V),
    ),
    "selective_scan_step": (
        selective_scan_step,
        dict(x=random(B, D), dt=random(B, D), a=rate(D, N), b=random(B, G, N), c=random(B, G, N))
        | dict(d=random(D), z=random(B, D), dt_bias=random(D)),
        random(B, D, N),
    ),
    "causal_conv1d_step": (
        causal_conv1d_step,
        dict(x=random(B, D), weight=random(D, W), bias=random(D)),
        random(B, D, W - 1),
    ),
}


def by_backends(ops: dict) -> list:
    """Each op on each of its backends."""
    return [
        pytest.param(name, backend, id=f"{name} by {backend}")
        for name, (op, *_) in ops.items()
        for backend in TABLES[op.__name__]
    ]


def views_of(tensors: dict[str, Tensor], backend: str):
    """How a view is made; the tensors as such views: all, or, of one element each, every other one.

    Each by itself too, but for Triton's, which takes seconds in its interpreter.
    """
    alone = [] if backend == "triton" else [[name] for name in tensors]
    for make in VIEWS.values():
        together = [[*tensors][::2], [*tensors][1::2]] if make is expanded else [tensors]
        for names in together + alone:
            yield make, tensors | {name: make(tensors[name]) for name in names}


def same_numbers(make, got, want):
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, msg=lambda said: f"{make.__name__}: {said}")


def gradients(op, tensors, options, grads_as):
    """Outputs, and gradients from incoming ones of that layout."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = op(**leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(0)
    incoming = [grads_as(torch.randn(x.shape, generator=generator)) for x in out]
    return [*out, *torch.autograd.grad(out, list(leaves.values()), incoming)]


@pytest.mark.parametrize("name, backend", by_backends(SEQUENCES))
def test_a_view_gives_the_numbers_of_a_copy(name, backend):
    op, tensors, options = SEQUENCES[name]
    op = able(op, backend)
    of_copies = gradients(op, tensors, options, dense)
    for make, views in views_of(tensors, backend):
        got, want = gradients(op, views, options, make), of_copies
        if make is expanded:
            copies = {name: dense(x) for name, x in views.items()}
            want = gradients(op, copies, options, lambda x: dense(expanded(x)))
        same_numbers(make, got, want)


@pytest.mark.parametrize("name, backend", by_backends(STEPS))
def test_a_step_reads_views_and_writes_to_one(name, backend):
    op, tensors, state = STEPS[name]
    op = able(op, backend)
    for make, views in views_of(tensors, backend):
        in_view = (part if make is expanded else make)(state)
        twin, copies = dense(state), {name: dense(x) for name, x in views.items()}
        want = op(**copies, state=twin)
        same_numbers(make, (op(**views, state=in_view), in_view), (want, twin))


@pytest.mark.parametrize("backend", ["cpp", "triton", "torch"])
@pytest.mark.parametrize("name", ["retention", "selective_scan", "causal_conv1d"])
def test_where_sequences_begin_may_be_every_other_of_some_numbers(name, backend):
    op, tensors, _ = SEQUENCES[name]
    op = able(op, backend)
    row = {name: x[:1] if x.dim() > 2 else x for name, x in tensors.items() if name != "initial_state"}
    bounds = torch.tensor([0, 9, 2, 9, T], dtype=torch.int32)[::2]
    assert torch.equal(op(**row, cu_seqlens=bounds), op(**row, cu_seqlens=bounds.clone()))


@pytest.mark.parametrize("name", STEPS)
def test_a_state_whose_elements_share_memory_is_refused(name):
    op, tensors, state = STEPS[name]
    with pytest.raises(ValueError, match=rf"{name}: state must be of elements of its own \(clone\(\) it\)"):
        op(**tensors, state=expanded(state))
