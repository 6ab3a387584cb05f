"""Retention in Triton: what the shapes of test_retention.py do not reach."""

import pytest
import torch
from devices import on_device, why_not
from tolerance import assert_agrees

from lcikernels import retention_step
from lcikernels.ops.retention.reference import retention as reference

if why := why_not("retention_step", "triton"):
    pytest.skip(why, allow_module_level=True)

from lcikernels.ops.retention import kernel

step = on_device(retention_step, "triton")


def inputs(B, Hq, Hk, Hv, K, V, dtype=torch.float32):
    H = max(Hq, Hk, Hv)
    heads = {"q": (Hq, K), "k": (Hk, K), "v": (Hv, V)}
    tokens = {name: torch.randn(B, 1, *size).to(dtype) for name, size in heads.items()}
    return tokens | {"log_decay": -torch.rand(B, 1, H), "initial_state": torch.randn(B, H, K, V)}


# B, Hq, Hk, Hv, K, V
SHAPES = {
    "odd everything": (2, 3, 3, 3, 5, 11),
    "shared heads, two tiles of columns": (2, 4, 1, 2, 8, 40),
    "more keys than a tile": (1, 1, 2, 2, 20, 3),
}


def one_token(q, k, v, log_decay, initial_state, return_final_state=True):
    state = initial_state.clone()
    o = step(*(u[:, 0] for u in (q, k, v, log_decay)), state=state)
    return o[:, None], state


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_equals_the_sequence_of_one_token(shape, monkeypatch, poisoned):
    monkeypatch.setattr(kernel, "BK", 16)
    assert_agrees(one_token, reference, **inputs(*shape), return_final_state=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_computed_in_float32(dtype, poisoned):
    assert_agrees(one_token, reference, **inputs(2, 2, 1, 2, 5, 3, dtype), return_final_state=True)


def test_a_decay_of_minus_infinity_forgets_everything():
    whole = inputs(1, 2, 2, 2, 4, 3)
    whole["log_decay"] = torch.full((1, 1, 2), -torch.inf)
    _, state = one_token(**whole)
    torch.testing.assert_close(state, whole["k"][:, 0, :, :, None] * whole["v"][:, 0, :, None, :])


def test_a_step_updates_a_state_of_any_strides():
    whole = inputs(2, 2, 2, 2, 5, 3)
    q, k, v, log_decay = (whole[name][:, 0] for name in ("q", "k", "v", "log_decay"))
    dense = whole["initial_state"]
    state = dense.mT.contiguous().mT
    o = step(q, k, v, log_decay, state=state)
    assert torch.equal(o, step(q, k, v, log_decay, state=dense)) and torch.equal(state, dense)
