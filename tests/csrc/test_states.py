"""The states that the compiled steps advance as they lie, on every instruction set."""

import pytest
import torch
from layouts import transposed
from tolerance import assert_agrees

from lcikernels import causal_conv1d_step, retention_step, selective_scan_step
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as conv_reference
from lcikernels.ops.retention.reference import retention as retention_reference
from lcikernels.ops.selective_scan.reference import selective_scan as scan_reference

R, OPS = torch.randn, torch.ops.lcikernels_cpp
B, H, K, V, D, N = 2, 3, 37, 21, 35, 19


def spaced(x):
    """Rows of a wider tensor, of every other of twice as many states."""
    return torch.cat([x, x], -1).repeat_interleave(2, 0)[::2, ..., : x.shape[-1]]


def retain(q, k, v, log_decay, state):
    return retention_step(q, k, v, log_decay, state=state, backend="cpp")


def scan(x, dt, a, b, c, d, z, dt_bias, state):
    options = dict(state=state, z=z, dt_bias=dt_bias, dt_softplus=True)
    return selective_scan_step(x, dt, a, b, c, d, **options, backend="cpp")


def convolve(x, weight, bias, state):
    return causal_conv1d_step(x, weight, bias, state=state, activation="silu", backend="cpp")


def with_softplus(**inputs):
    return scan_reference(**inputs, dt_softplus=True)


def with_silu(**inputs):
    return conv_reference(**inputs, activation="silu")


PARAMETERS = ("a", "d", "dt_bias", "weight", "bias")
CASES = {
    "retention": (
        retain,
        retention_reference,
        dict(q=R(B, H, K), k=R(B, 1, K), v=R(B, H, V), log_decay=-torch.rand(B, H)),
        R(B, H, K, V),
        (torch.clone, transposed, spaced),
    ),
    "selective_scan": (
        scan,
        with_softplus,
        dict(x=R(B, D), dt=R(B, D), a=-torch.rand(D, N), b=R(B, 5, N), c=R(B, 5, N))
        | dict(d=R(D), z=R(B, D), dt_bias=R(D)),
        R(B, D, N),
        (torch.clone, spaced),
    ),
    **{
        f"causal_conv1d of {W} taps": (
            convolve,
            with_silu,
            dict(x=R(B, D), weight=R(D, W), bias=R(D)),
            R(B, D, W - 1),
            (torch.clone, transposed, spaced),
        )
        for W in (2, 3, 4, 6)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_state_of_other_strides_is_as_exact_as_the_reference(instruction_set, name, poisoned):
    step, reference, token, state, layouts = CASES[name]

    def one_token(initial_state, return_final_state, layout, **inputs):
        there = layout(initial_state)
        token = {key: u if key in PARAMETERS else u[:, 0] for key, u in inputs.items()}
        return step(**token, state=there)[:, None], there

    def whole_sequence(layout, **inputs):
        return reference(**inputs)

    whole = {key: u if key in PARAMETERS else u[:, None] for key, u in token.items()}
    whole |= dict(initial_state=state, return_final_state=True)
    for layout in layouts:
        assert_agrees(one_token, whole_sequence, **whole, layout=layout)


@pytest.mark.parametrize("name", CASES)
def test_a_bfloat16_state_is_the_float32_one_rounded_once(instruction_set, name):
    step, _, token, state, layouts = CASES[name]
    for layout in layouts:
        there = layout(state.bfloat16())
        exact = there.float()
        want = step(**token, state=exact)
        assert torch.equal(step(**token, state=there), want)
        assert torch.equal(there, exact.bfloat16())


def test_the_library_refuses_states_that_it_cannot_advance():
    q, v, x, weight = R(2, 3, 4), R(2, 3, 5), R(2, 6), R(6, 4)
    state, rows = R(4, 3, 4, 5), torch.tensor([0, 4])
    with pytest.raises(RuntimeError, match="retention_step: state_indices must be below S=4, got 4"):
        OPS.retention_step(q, q, v, -torch.rand(3), state, 1.0, rows)
    with pytest.raises(RuntimeError, match="retention_step: state_indices must be Long, got Int"):
        OPS.retention_step(q, q, v, -torch.rand(3), state, 1.0, rows.int())
    with pytest.raises(RuntimeError, match="selective_scan_step: state must be contiguous in its last axis"):
        token = x, x, R(6, 3), R(2, 3), R(2, 3), None, None, None, True
        OPS.selective_scan_step(*token, R(2, 3, 6).mT, None)
    with pytest.raises(RuntimeError, match="causal_conv1d_step: state must be .* with slots at least 3"):
        OPS.causal_conv1d_step(x, weight, None, True, R(2, 6, 2), None, None)
    with pytest.raises(RuntimeError, match=r"causal_conv1d_step: positions must be \[B\] with B=2, got 1"):
        OPS.causal_conv1d_step(x, weight, None, True, R(2, 6, 3), None, rows[:1])
