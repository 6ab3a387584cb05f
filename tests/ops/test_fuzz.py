"""Every op on calls that nobody thought of, against its reference in float64: the same ones each time, ten
thousand of each op by `make fuzz`."""

from importlib import import_module

import op_calls
import pytest
import torch
from devices import multiplied, on_device, why_not
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from op_calls import laid, made, steps_by_reference
from op_trials import OPS, STEPS
from tolerance import assert_agrees, outputs_and_grads

import lcikernels
from lcikernels.backends import TABLES

# Of each op in `make test`, every one of them compared.
SAMPLE = 30


def reference_of(name):
    """The op in the dtype of its arguments; a step's is that of whole sequences."""
    op = name.removesuffix("_step")
    reference = getattr(import_module(f"lcikernels.ops.{op}.reference"), op)
    if op == name:
        return reference
    return lambda **token: steps_by_reference(name, reference, **token)


def advanced(op):
    """A step as a function: what it returns, and the states that it leaves."""

    def run(state, **token):
        after = op(state=state, **token)
        return after, state

    return run


@st.composite
def calls_of(draw, name):
    """A call, and a backend that computes one of its dtype here."""
    call = draw(getattr(op_calls, name)())
    dtype = next(iter(call.values())).dtype
    able = [x for x in TABLES[name] if x != "triton" and not why_not(name, x, dtype)]
    return draw(st.sampled_from(able)), call


def check(name, backend, call):
    """One call of an op by a backend; one whose results are beyond its dtypes is drawn again."""
    first = next(iter(call.values()))
    op = on_device(getattr(lcikernels, name), backend)
    op = advanced(op) if name in STEPS else op
    products = multiplied(first.dtype) if (name, backend) == ("retention", "cpp") else None
    reference, tensors = laid(reference_of(name), call), made(call)
    assume(fits(reference, tensors, first.dtype))
    assert_agrees(laid(op, call), reference, products, few=1, **tensors)


def fits(reference, tensors, activation):
    """Are the results, and the gradients, numbers of the dtypes that they are to have?"""
    truth = outputs_and_grads(reference, tensors, torch.Tensor.double, 0)
    assert not any(x.isnan().any() for x in truth.values())
    dtypes = {f"gradient of {name}": x.dtype for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    limits = {what: torch.finfo(dtypes.get(what, activation)).max / 4 for what in truth}
    return all(x.numel() == 0 or x.abs().max() < limits[what] for what, x in truth.items())


def many(count, strategy, test):
    """`test` on so many calls, the same ones each time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    options = dict(deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    phases = [Phase.generate, Phase.shrink]
    settings(max_examples=count, phases=phases, **options)(given(strategy)(test))()


@pytest.mark.parametrize("name", OPS)
def test_any_call_is_as_exact_as_the_reference(name, request, poisoned):
    wanted, compared = request.config.getoption("calls") or SAMPLE, []

    def test(drawn):
        check(name, *drawn)
        compared.append(drawn)

    many(wanted, calls_of(name), test)
    assert len(compared) >= wanted
