"""Wherever a sequence is cut and its state handed over, the whole is the same."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lcikernels import causal_conv1d, retention, selective_scan

# A length, a place to cut it, and three odd sizes.
CASES = st.integers(2, 70).flatmap(
    lambda T: st.tuples(st.just(T), st.integers(1, T - 1), *[st.integers(1, 9)] * 3, st.integers(0, 2**32))
)


def halves_and_whole(op, cut, *sequences):
    """`op` over the two parts with the state handed over, and at once."""
    first, state = op(None, *(x[:, :cut] for x in sequences))
    second, state = op(state, *(x[:, cut:] for x in sequences))
    return (torch.cat([first, second], 1), state), op(None, *sequences)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(CASES)
def test_two_parts_with_the_state_handed_over_equal_the_whole(case):
    T, cut, H, K, V, seed = case
    torch.manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def retain(state, q, k, v, log_decay):
        return retention(q, k, v, log_decay, initial_state=state, return_final_state=True)

    assert_close(
        *halves_and_whole(
            retain, cut, random(1, T, H, K), random(1, T, 1, K), random(1, T, H, V), -random(1, T, H).abs()
        )
    )

    a = -random(K, V).exp()

    def scan(state, x, dt, b, c):
        return selective_scan(x, dt, a, b, c, initial_state=state, return_final_state=True)

    bc = random(1, T, V), random(1, T, V)
    assert_close(*halves_and_whole(scan, cut, random(1, T, K), random(1, T, K).abs(), *bc))

    weight = random(K, H)

    def convolve(state, x):
        return causal_conv1d(x, weight, initial_state=state, return_final_state=True)

    assert_close(*halves_and_whole(convolve, cut, random(1, T, K)))
