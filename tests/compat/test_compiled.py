"""Every function traced whole by torch.compile, forward and backward: the numbers of the call without it."""

import pytest
import torch
from torch import Tensor

from lcikernels.compat import causal_conv1d as conv
from lcikernels.compat import mamba_ssm as mamba

B, D, L, N, H, P, G, W, R = 2, 6, 5, 3, 4, 3, 2, 4, 2
NUMBERS = torch.tensor([[0, 0, 1, 1, 1], [-1, 0, 0, 0, 1]], dtype=torch.int32)
BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)


def r(*shape) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def heads() -> tuple[Tensor, ...]:
    return r(B, L, H, P), r(B, L, H), (-torch.rand(H)).requires_grad_(), r(B, L, G, N), r(B, L, G, N), 4


def one_row(seq_idx, cu_seqlens):
    x, dt, A, *maps, chunk = heads()
    return (x[:1], dt[:1], A, *(M[:1] for M in maps), chunk), {
        "seq_idx": seq_idx,
        "cu_seqlens": cu_seqlens,
        "return_varlen_states": True,
        "return_final_states": True,
    }


def layer():
    matrices = r(R + 2 * N, D), r(D, R), r(7, D), r(7), (-torch.rand(D, N)).requires_grad_()
    return (r(B, 2 * D, L), r(D, 1, W), r(D), *matrices), {"D": r(D), "delta_bias": r(D)}


def split():
    channels = H * P + 2 * G * N
    tensors = (
        r(B, L, H * P + channels + H),
        r(channels, W),
        r(channels),
        r(H),
        (-torch.rand(H)).requires_grad_(),
    )
    options = {"rmsnorm_weight": r(H * P), "outproj_weight": r(7, H * P), "outproj_bias": r(7)}
    return (*tensors, r(H), 4), {"headdim": P, "ngroups": G, "norm_before_gate": False, **options}


CALLS = {
    "convolution": (conv.causal_conv1d_fn, lambda: ((r(B, D, L), r(D, W), r(D)), {"activation": "swish"})),
    "convolution from a state": (
        conv.causal_conv1d_fn,
        lambda: (
            (r(B, D, L), r(D, W), r(D)),
            {"initial_states": r(B, D, W - 1), "return_final_states": True},
        ),
    ),
    "numbered convolution": (
        conv.causal_conv1d_fn,
        lambda: ((r(B, D, L), r(D, W), r(D), NUMBERS), {"activation": "silu"}),
    ),
    "convolution step": (
        conv.causal_conv1d_update,
        lambda: ((r(B, D), torch.randn(B, D, W), r(D, W), r(D), "silu"), {}),
    ),
    "convolution steps": (
        conv.causal_conv1d_update,
        lambda: ((r(B, D, 2), torch.randn(B, D, W - 1), r(D, W)), {}),
    ),
    "states": (conv.causal_conv1d_varlen_states, lambda: ((r(L, D), BOUNDS, 3), {})),
    "scan": (
        mamba.selective_scan_fn,
        lambda: (
            (r(B, D, L), r(B, D, L), (-torch.rand(D, N)).requires_grad_(), r(B, N, L), r(B, G, N, L)),
            {
                "D": r(D),
                "z": r(B, D, L),
                "delta_bias": r(D),
                "delta_softplus": True,
                "return_last_state": True,
            },
        ),
    ),
    "scan of several dtypes": (
        mamba.selective_scan_fn,
        lambda: (
            (r(B, D, L).bfloat16(), r(B, D, L), -torch.rand(D, N), r(B, N, L), r(D, N)),
            {"delta_softplus": True},
        ),
    ),
    "layer": (mamba.mamba_inner_fn, layer),
    "step": (
        mamba.selective_state_update,
        lambda: ((torch.randn(B, D, N), r(B, D), r(B, D), -torch.rand(D, N), r(B, N), r(B, N)), {}),
    ),
    "step of heads": (
        mamba.selective_state_update,
        lambda: (
            (torch.randn(B, H, P, N), r(B, H, P), r(B, H, P), -torch.rand(H, P, N), r(B, G, N), r(B, G, N)),
            {},
        ),
    ),
    "heads": (
        mamba.mamba_chunk_scan_combined,
        lambda: (heads(), {"D": r(H), "z": r(B, L, H, P), "dt_bias": r(H), "dt_softplus": True}),
    ),
    "numbered heads": (
        mamba.mamba_chunk_scan_combined,
        lambda: (
            heads(),
            {"seq_idx": NUMBERS, "initial_states": r(B, H, P, N), "return_final_states": True},
        ),
    ),
    "states of packed heads": (mamba.mamba_chunk_scan_combined, lambda: one_row(NUMBERS[:1], BOUNDS)),
    "layer of heads": (mamba.mamba_split_conv1d_scan_combined, split),
    "norm": (mamba.rmsnorm_fn, lambda: ((r(B, L, D), r(D), r(D)), {"z": r(B, L, D), "group_size": 3})),
    "layer norm": (
        mamba.layernorm_fn,
        lambda: ((r(B, L, D), r(D), r(D)), {"z": r(B, L, D), "norm_before_gate": False}),
    ),
}


def results(function, args, kwargs) -> list[Tensor]:
    """The outputs, what became of the first two arguments, and the gradients of all."""
    args, kwargs = [copy(u) for u in args], {name: copy(u) for name, u in kwargs.items()}
    leaves = [u for u in (*args, *kwargs.values()) if isinstance(u, Tensor) and u.requires_grad]
    out = function(*args, **kwargs)
    out = out if isinstance(out, tuple) else (out,)
    grads = []
    if any(u.requires_grad for u in out):
        grads = torch.autograd.grad([u.float().square().sum() for u in out], leaves, allow_unused=True)
    return [*out, *args[:2], *grads]


def copy(u):
    return u.detach().clone().requires_grad_(u.requires_grad) if isinstance(u, Tensor) else u


@pytest.mark.parametrize("function, call", CALLS.values(), ids=CALLS)
def test_a_compiled_call_gives_the_same_numbers(function, call):
    args, kwargs = call()
    torch._dynamo.reset()
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(traced, args, kwargs), results(function, args, kwargs), strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_compiled_step_of_mamba_2_is_that_of_a_retention():
    state, x, B_, C = torch.randn(B, H, P, N), r(B, H, P), r(B, G, N), r(B, G, N)
    dt, A, bias = r(B, H), -torch.rand(H), r(H)

    def step(state):
        expanded = dt[..., None].expand(B, H, P), A[:, None, None].expand(H, P, N)
        return mamba.selective_state_update(
            state, x, *expanded, B_, C, dt_bias=bias[:, None].expand(H, P), dt_softplus=True
        )

    graphs = []

    def keep(graph, example):
        graphs.append(graph.code)
        return graph

    other = state.clone()
    torch._dynamo.reset()
    y = torch.compile(step, fullgraph=True, backend=keep)(state)
    assert torch.equal(y, step(other)) and torch.equal(state, other)
    assert len(graphs) == 1 and "retention_step" in graphs[0]
