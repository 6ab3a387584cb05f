"""Every argument of every op, made wrong in every way that there is: refused in one line that names both."""

import re

import pytest
import torch
from ops.test_refusals import CALLS, cu, q

from lcikernels import (
    causal_conv1d_step,
    kronecker_expand,
    retention_step,
    selective_scan_step,
)
from lcikernels.backends import TABLES

OPS = pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
STEPS = (retention_step, selective_scan_step, causal_conv1d_step)
NUMBERS = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)]
# Sizes that are told by one argument alone in CALLS, and heads, of which there may be one for two.
FREE = {
    "retention": {("q", 2), ("k", 2), ("v", 2)},
    "retention_segment": {("k", 2), ("v", 2), ("k", 3), ("v", 3)},
    "retention_step": {("q", 1), ("k", 1), ("v", 1), ("state", 0)},
    "selective_scan_segment": {("b", 2)},
    "selective_scan_step": {("state", 0)},
    "causal_conv1d_step": {("state", 0), ("state", 2), ("weight", 1)},
    "kronecker_expand": {("write", 0), ("read", 0), ("depth", 0)},
}


def refused(op, arguments, by=ValueError):
    """The one line that says so, and which argument it names."""
    with pytest.raises(by) as refusal:
        op(**arguments)
    line = str(refusal.value)
    told = re.fullmatch(rf"{op.__name__}: (\w+) must be .+, got .+|{op.__name__}: .*(backend) .+", line)
    assert told, line
    return told[1] or told[2]


def other_sizes(x):
    """x with one index more, one less or none along each axis, and that axis."""
    for axis, size in enumerate(x.shape):
        for other in {size + 1, size - 1, 0} - {size}:
            yield axis, x.new_zeros([*x.shape[:axis], other, *x.shape[axis + 1 :]])


@OPS
def test_an_axis_more_or_less_is_refused(op):
    for name, x in CALLS[op].items():
        rates_of_rows = (1, *x.shape) if (op, name) == (retention_step, "log_decay") else None
        shapes = {(), (1, *x.shape), (*x.shape, 1), (1, 1, *x.shape), x.shape[1:], x.shape[:-1]}
        for shape in shapes - {tuple(x.shape), rates_of_rows}:
            assert refused(op, CALLS[op] | {name: x.new_zeros(shape)}) in CALLS[op], (name, shape)


@OPS
def test_an_index_more_or_less_along_any_axis_is_refused(op):
    for name, x in CALLS[op].items():
        for axis, other in other_sizes(x):
            free = (name, axis) in FREE.get(op.__name__, ()) and other.numel()
            if free or name == "cu_seqlens" and len(other) == 3:
                continue
            assert refused(op, CALLS[op] | {name: other}) in CALLS[op], (name, axis)


@OPS
@pytest.mark.filterwarnings("ignore:.*omplex")
def test_any_other_dtype_is_refused_or_computed_with(op):
    """Parameters and states may be of several."""
    for name, x in CALLS[op].items():
        for dtype in NUMBERS:
            try:
                other = x.to(dtype)
            except (RuntimeError, NotImplementedError, TypeError):  # quantized, and bits that have no numbers
                continue
            arguments = {key: u.clone() for key, u in CALLS[op].items()} | {name: other}
            try:
                op(**arguments)
            except ValueError:
                assert refused(op, arguments) in CALLS[op], (name, dtype)
            else:
                indices = name in ("cu_seqlens", "state_indices", "positions")
                taken = (
                    (torch.int32, torch.int64) if indices else (torch.float32, torch.bfloat16, torch.float16)
                )
                assert dtype in (*taken, torch.float64), (name, dtype)


NO_FLAGS = None, "yes", 2, 1.0, [], torch.ones(2), object()
NO_NUMBERS = "1", "x", [], torch.ones(2), object(), float("nan"), 1j, 10**400, torch.ones((), device="meta")
OPTIONS = {
    "scale": NO_NUMBERS,
    "eps": (*NO_NUMBERS, None, -1e-5),
    "groups": (None, "2", 1.0, 0, -1, 3, torch.ones(2), 10**30),
    "return_final_state": NO_FLAGS,
    "dt_softplus": NO_FLAGS,
    "norm_before_gate": NO_FLAGS,
    "added": NO_FLAGS,
    "activation": ("relu", 3, b"silu", ["silu"], torch.ones(2), object()),
    "kind": (None, "batch", 3, ["rms"], torch.ones(2)),
}


@OPS
def test_any_option_that_is_none_is_refused(op):
    names = [name for name in OPTIONS if name in op.__code__.co_varnames[: count_of_arguments(op)]]
    for name in names:
        for value in OPTIONS[name]:
            assert refused(op, CALLS[op] | {name: value}) == name, value


def count_of_arguments(op):
    return op.__code__.co_argcount + op.__code__.co_kwonlyargcount


@OPS
def test_what_is_no_backend_is_refused(op):
    for backend in ("", "CPP", "cuda0", 3, b"cpp", ["cpp"], torch.ones(2), object()):
        assert refused(op, CALLS[op] | {"backend": backend}, RuntimeError) == "backend"


@pytest.mark.parametrize("op", STEPS, ids=lambda op: op.__name__)
def test_states_that_share_elements_are_refused_and_others_are_not(op):
    """Windows of one memory, or one state for all rows; but any order of axes and any distances will do."""
    call = CALLS[op] | {"state_indices": cu(1)}
    S, *inner = 3, *call["state"].shape[1:]
    memory, size = torch.zeros(4000), call["state"][0].numel()
    steps = torch.empty(inner).stride()
    for strides in [(0, *steps), (size - 1, *steps), (1, *steps), (size, *steps[:-1], 0)]:
        if op is causal_conv1d_step and strides[-1] == 0:
            strides = (size, 1, *strides[2:])
        shared = memory.as_strided([S, *inner], strides)
        assert refused(op, call | {"state": shared}) == "state"
    for strides in [(size, *steps), (size + 3, *steps), (2 * size, *[2 * step for step in steps])]:
        op(**call | {"state": memory.as_strided([S, *inner], strides)})
    turned = memory.as_strided([S, *reversed(inner)], (size, *torch.empty(inner[::-1]).stride()))
    op(**call | {"state": turned.transpose(1, len(inner))})


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("bounds", [(0, -1, 5), (0, 6, 5), (0, 2**31 - 1, 5), (-1, 5), (0, 5, 5, 4), (5, 0)])
def test_wrong_boundaries_are_refused_whatever_computes(bounds, backend):
    for op, call in CALLS.items():
        if "cu_seqlens" in call and TABLES[op.__name__][backend].why_not(q(1)) is None:
            states = {"initial_state": None}
            assert (
                refused(op, call | states | {"cu_seqlens": cu(*bounds), "backend": backend}) == "cu_seqlens"
            )
            wide = cu(*(2 * bound for bound in bounds[:-1]), 2**32 + 5, dtype=torch.int64)
            assert refused(op, call | states | {"cu_seqlens": wide, "backend": backend}) == "cu_seqlens"


def test_more_of_what_is_no_layer_is_refused():
    """A map for each old layer, of another number of them, and added units that are not shared."""
    call = CALLS[kronecker_expand]
    for name in ("write", "read"):
        own = call[name].expand(3, -1, -1)
        assert refused(kronecker_expand, call | {name: own}) == name
        assert refused(kronecker_expand, call | {name: own[:2], "added": True}) == name
