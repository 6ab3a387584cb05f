"""The causal convolution in C++ (csrc/cpu/causal_conv1d.cpp): a lane per channel, the window in registers."""

import torch
from torch import Tensor

from ..checks import along_an_axis, along_rows, boundaries, contiguous, inner
from ..states import int64, native


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [B or N, D, W-1]."""
    inputs = prepare(x, weight, bias, activation, initial_state, cu_seqlens)
    return torch.ops.lcikernels_cpp.causal_conv1d_forward(*inputs)


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (empty where it is missing) and the initial state."""
    inputs = prepare(x, weight, bias, activation, initial_state, cu_seqlens)
    dx, dweight, dbias, dstate = torch.ops.lcikernels_cpp.causal_conv1d_backward(
        along_an_axis(grad_y), contiguous(grad_state), *inputs
    )
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype), dstate


takes = native  # of any strides


def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    state_indices: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """y [B, D]; `state` is updated in place."""
    inputs, silu = (along_rows(x), *filters(x, weight, bias)), activation == "silu"
    state_indices, positions = int64(state_indices), int64(positions)
    return torch.ops.lcikernels_cpp.causal_conv1d_step(*inputs, silu, state, state_indices, positions)


def prepare(x, weight, bias, activation, initial_state, cu_seqlens) -> tuple:
    """What the library takes."""
    if cu_seqlens is not None:
        boundaries("causal_conv1d", cu_seqlens, x.shape[1])
    states = contiguous(initial_state), contiguous(cu_seqlens)
    return along_an_axis(x), *filters(x, weight, bias), activation == "silu", *states


def filters(x, weight, bias) -> tuple[Tensor, Tensor | None]:
    """In what is computed in."""
    weight = weight.to(inner(x)).contiguous()
    return weight, bias if bias is None else bias.to(weight.dtype).contiguous()
