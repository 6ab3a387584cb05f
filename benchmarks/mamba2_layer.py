"""A Mamba-2 layer: transformers' own and ours; and both without the projections, which both leave to torch.

The truth is transformers' mixer in float64, to which tests/layers/test_mamba2.py finds ours equal.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from tolerance import Float64Kept
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.sides import Op, Side


@cache
def ours(H: int, P: int, N: int) -> nn.Module:
    """H heads of P channels, N states a channel."""
    from lcikernels.layers import Mamba2

    return Mamba2(H * P // 2, state_size=N, head_dim=P)


@cache
def theirs(H: int, P: int, N: int) -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = dict(hidden_size=H * P // 2, num_heads=H, head_dim=P, state_size=N, n_groups=1)
    mixer = Mamba2Mixer(Mamba2Config(**sizes, num_hidden_layers=1), 0)
    return mixer.eval()  # else it asks for the weight of out_proj before it finds that it needs none


@cache
def inside(whole: Callable, H: int, P: int, N: int) -> nn.Module:
    """A layer of its own without its projections."""
    layer = whole.__wrapped__(H, P, N)
    layer.hidden_size = layer.in_proj.out_features
    layer.in_proj = layer.out_proj = nn.Identity()
    return layer


def layer_inputs(B: int, T: int, H: int, P: int, N: int) -> dict[str, Tensor]:
    """Its input, and a fresh layer's weights."""
    x = torch.randn(B, T, H * P // 2)  # before the layer, whose weights are drawn once
    return {"x": x} | {name: weight.detach() for name, weight in ours(H, P, N).named_parameters()}


def inside_inputs(B: int, T: int, H: int, P: int, N: int) -> dict[str, Tensor]:
    """What in_proj gives where its input is layer_inputs'."""
    inputs = layer_inputs(B, T, H, P, N)
    x = inputs.pop("x") @ inputs.pop("in_proj.weight").T
    inputs.pop("out_proj.weight")
    return {"x": x} | inputs


def sizes(weights: dict[str, Tensor]) -> tuple[int, int, int]:
    H, D, conv = (len(weights[name]) for name in ("D", "norm.weight", "conv1d.bias"))
    return H, D // H, (conv - D) // 2


def run(layer, x: Tensor, **weights: Tensor) -> Tensor:
    return functional_call(layer(*sizes(weights)), weights, (x,))


def run_theirs(layer, x: Tensor, **weights: Tensor) -> Tensor:
    weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
    return run(layer, x, **weights)


def reference(layer, x: Tensor, **weights: Tensor) -> Tensor:
    with Float64Kept():
        return run_theirs(layer, x, **weights)


def run_patched(layer, x: Tensor, **weights: Tensor) -> Tensor:
    from lcikernels.compat.transformers import patch

    with patch():
        return run_theirs(layer, x, **weights)


def without_projections(x: Tensor, **weights: Tensor) -> Tensor:
    return x[..., : len(weights["norm.weight"])]


def op(inputs: Callable, ours: Callable, theirs: Callable, like: str | Callable = "x") -> Op:
    sides = {
        "ours": Side(partial(run, ours), ours=True),
        "transformers": Side(partial(run_theirs, theirs)),
        "transformers, patched": Side(partial(run_patched, theirs)),
    }
    return Op(inputs, partial(reference, theirs), sides, like=like)


OPS = {
    "a Mamba-2 layer": op(layer_inputs, ours, theirs),
    "a Mamba-2 layer without its projections": op(
        inside_inputs, partial(inside, ours), partial(inside, theirs), without_projections
    ),
}
