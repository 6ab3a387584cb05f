"""What a segment of a sequence adds to a state, and what it leaves of it."""

import pytest
import torch
from devices import on_device, why_not
from shapes import RETENTION, SELECTIVE_SCAN
from tolerance import assert_agrees

from lcikernels import retention_segment, selective_scan_segment
from lcikernels.backends import TABLES
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


def able(op, backend, dtype=torch.float32):
    if why := why_not(op.__name__, backend, dtype):
        pytest.skip(why)
    return on_device(op, backend)


@pytest.fixture(params=TABLES["retention_segment"])
def retain(request):
    return able(retention_segment, request.param)


@pytest.fixture(params=TABLES["selective_scan_segment"])
def scan(request):
    return able(selective_scan_segment, request.param)


@pytest.mark.parametrize("per_token", [False, True], ids=["rate per head", "rate per token"])
@pytest.mark.parametrize("shape", RETENTION.values(), ids=RETENTION)
def test_of_retention_outputs_and_gradients_are_as_exact_as_the_reference(retain, shape, per_token, poisoned):
    inputs = retention_inputs(*shape, per_token=per_token)
    assert_agrees(retain, retention_reference.retention_segment, **inputs)


@pytest.mark.parametrize("shape", SELECTIVE_SCAN.values(), ids=SELECTIVE_SCAN)
def test_of_the_scan_outputs_and_gradients_are_as_exact_as_the_reference(scan, shape, poisoned):
    assert_agrees(scan, scan_reference.selective_scan_segment, **scan_inputs(*shape))


def test_the_bare_recurrence(scan):
    bare = scan_inputs(2, 20, 5, 3)
    bare["dt"] = bare["dt"].detach().abs().requires_grad_()
    assert_agrees(scan, scan_reference.selective_scan_segment, **bare | dict(dt_bias=None, dt_softplus=False))
