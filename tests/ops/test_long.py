"""A million tokens, and tensors whose elements lie further apart than 32 bits can tell."""

import mmap
import sys
from importlib import import_module

import pytest
import torch
from devices import why_not
from op_trials import STEPS, inputs
from torch.testing import assert_close

import lcikernels
from lcikernels.backends import TABLES

T, EDGE, SEEN = 2**20 + 1, 64, 512
OPS = {
    "retention": lambda: dict(q=r(1, T, 1, 4), k=r(1, T, 1, 4), v=r(1, T, 1, 3), log_decay=rates(1, T, 1)),
    "selective_scan": lambda: (
        dict(x=r(1, T, 2), dt=-rates(1, T, 2), a=4 * rates(2, 2), b=r(1, T, 2))
        | dict(c=r(1, T, 2), z=r(1, T, 2))
    ),
    "causal_conv1d": lambda: dict(x=r(1, T, 3), weight=r(3, 4), bias=r(3), activation="silu"),
    "gated_rms_norm": lambda: dict(x=r(1, T, 5), gate=r(1, T, 5), weight=r(5)),
}
OF_TOKENS = ("q", "k", "v", "log_decay", "x", "dt", "b", "c", "z", "gate")


def r(*shape):
    return torch.randn(shape)


def rates(*shape):
    """From exp(-0.5) to exp(-1) a token: what is 400 tokens away is gone, in float64 too."""
    return -0.5 - 0.5 * torch.rand(shape)


def cut(given, tokens, dtype):
    return {
        name: x[:, tokens].to(dtype)
        if name in OF_TOKENS
        else x.to(dtype)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in given.items()
    }


def outputs_and_grads(op, given, cotangent):
    """And the gradients of what has tokens, along whom they are."""
    leaves = [x.requires_grad_() for name, x in given.items() if name in OF_TOKENS]
    out = op(**given)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype).view(out.shape))]


# The scan in torch has a loop over tokens.
BY_CPU = [
    (op, backend)
    for op in OPS
    for backend in TABLES[op]
    if backend in ("cpp", "torch") and (op, backend) != ("selective_scan", "torch")
]
WITH_STATES = [(op, backend) for op, backend in BY_CPU if op != "gated_rms_norm"]


@pytest.mark.parametrize("op, backend", BY_CPU, ids=map(" by ".join, BY_CPU))
def test_of_a_million_tokens_both_ends_and_the_middle_are_the_reference_s(op, backend):
    """Tokens forget, so a part that begins SEEN tokens before and ends SEEN behind gives the same."""
    if why := why_not(op, backend):
        pytest.skip(why)
    given = OPS[op]()
    width = (given.get("v") if "v" in given else given["x"]).shape[-1]
    cotangent = r(1, T, width)
    got = outputs_and_grads(
        lambda **x: getattr(lcikernels, op)(**x, backend=backend),
        cut(given, slice(None), torch.float32),
        cotangent,
    )
    reference = getattr(import_module(f"lcikernels.ops.{op}.reference"), op)
    for start in (0, T // 2, T - EDGE):
        tokens = slice(max(0, start - SEEN), min(T, start + EDGE + SEEN))
        want = outputs_and_grads(reference, cut(given, tokens, torch.float64), cotangent[:, tokens])
        for x, y in zip(got, want):
            y = y[:, start - tokens.start :][:, :EDGE]
            assert_close(x[:, start : start + EDGE].double(), y, rtol=1e-4, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("op, backend", WITH_STATES, ids=map(" by ".join, WITH_STATES))
def test_a_million_tokens_are_two_halves_with_the_state_handed_over(op, backend):
    if why := why_not(op, backend):
        pytest.skip(why)
    given, run = cut(OPS[op](), slice(None), torch.float32), getattr(lcikernels, op)
    whole, last = run(**given, return_final_state=True, backend=backend)
    state, parts = None, []
    for tokens in (slice(0, T // 3), slice(T // 3, T)):
        part = cut(given, tokens, torch.float32)
        y, state = run(**part, initial_state=state, return_final_state=True, backend=backend)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert_close(state, last, rtol=1e-4, atol=1e-4)


NORESERVE = 0x4000  # Linux's; Python has a name for it from 3.13 on
APART = 2**26  # elements, of which 40 lie beyond 2**31


def far_apart(x, axis):
    """x with the indices of an axis APART elements from each other, in pages that nothing else touches."""
    strides = [1] * x.dim()
    for i in reversed(range(x.dim() - 1)):
        strides[i] = strides[i + 1] * x.shape[i + 1]
    strides = [APART if i == axis else stride for i, stride in enumerate(strides)]
    size = (APART * x.shape[axis] + x.numel()) * x.element_size()
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    memory = torch.frombuffer(pages, dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


FAR = {
    "retention": (1, ("q", "k", "v")),
    "selective_scan": (1, ("x", "dt", "b", "c", "z")),
    "causal_conv1d": (1, ("x",)),
    "gated_rms_norm": (1, ("x", "gate")),
    "retention_step": (0, ("q", "k", "v", "state")),
    "selective_scan_step": (0, ("x", "dt", "b", "c", "state")),
    "causal_conv1d_step": (0, ("x", "state")),
}
BY_FAR = [(op, backend) for op in FAR for backend in TABLES[op] if backend in ("cpp", "torch")]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is reserved here")
@pytest.mark.parametrize("op, backend", BY_FAR, ids=map(" by ".join, BY_FAR))
def test_offsets_beyond_32_bits(op, backend):
    if why := why_not(op, backend):
        pytest.skip(why)
    axis, names = FAR[op]
    given = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs(op, 0, 40).items()}
    for name in names:  # 40 of one row, or of one token
        given[name] = given[name][:1].repeat(*[40 if axis == 0 else 1, *[1] * (given[name].dim() - 1)])
    apart = given | {name: far_apart(given[name], axis) for name in names}
    run = getattr(lcikernels, op)
    assert_close(run(**apart, backend=backend), run(**given, backend=backend))
    if op in STEPS:
        assert_close(apart["state"], given["state"])
