"""causal-conv1d's functions, as published in 1.6: [B, D, L] tensors go to the ops as [B, L, D] views of them.

Results have the shape, dtype and layout of x; what is computed in float32 is rounded once. Gradients reach
every floating argument of `causal_conv1d_fn`, from the result and from the final states.
"""

import torch
from torch import Tensor

from lcikernels.compat.indices import check_numbers, check_rows
from lcikernels.compat.numbered import convolve_numbered
from lcikernels.compat.serving import serves
from lcikernels.ops import causal_conv1d, causal_conv1d_step, checks

ACTIVATIONS = (None, "silu", "swish")
NAMED = "None, 'silu' or 'swish'; another one is to be applied to the result without activation"


def activation_of(op: str, activation: str | None) -> str | None:
    """As the ops spell it: swish is silu."""
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    return activation and "silu"


@serves(
    partly={
        "seq_idx": "without initial_states and final states; a sequence begins where the number changes",
        "final_states_out": "with return_final_states",
        "activation": NAMED,
    }
)
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[..., t] = activation(bias + sum_{w<W} weight[:, w] * x[..., t - (W-1) + w]).

    x [B, D, L]; weight [D, W], bias [D]; activation None, "silu" or "swish". seq_idx int32 or int64 [B, L],
    the number of each token's sequence, no token sees another sequence, and tokens of number -1 give 0.
    initial_states [B, D, W-1], the tokens before the first. Returns y [B, D, L], with return_final_states
    also the last W-1 tokens [B, D, W-1] in x's dtype, in final_states_out where that is given. Raises
    ValueError where an argument does not fit.
    """
    op, sizes = "causal_conv1d_fn", {}
    checks.shape(op, "x", x, "B D L", sizes)
    checks.shape(op, "weight", weight, "D W", sizes)
    if bias is not None:
        checks.shape(op, "bias", bias, "D", sizes)
    checks.parameters(op, x, x=x, weight=weight, bias=bias, initial_states=initial_states)
    activation = activation_of(op, activation)
    states = {**sizes, "W-1": sizes["W"] - 1}
    if final_states_out is not None:
        checks.shape(op, "final_states_out", final_states_out, "B D W-1", states)
        checks.parameters(op, x, final_states_out=final_states_out)
        checks.written(op, final_states_out=final_states_out)
        if not return_final_states:
            checks.refuse(op, "final_states_out", "given with return_final_states=True", "it alone")
    if seq_idx is not None:
        check_numbers(op, seq_idx, x, sizes)
        if initial_states is not None or return_final_states:
            argument = "return_final_states" if initial_states is None else "initial_states"
            got = return_final_states if initial_states is None else "a tensor"
            checks.refuse(op, argument, "left out where seq_idx is given", got)
        return convolve_numbered(x.mT, weight, bias, activation, seq_idx).mT
    if initial_states is not None:
        checks.shape(op, "initial_states", initial_states, "B D W-1", states)
        initial_states = initial_states.to(checks.inner(x))
    y, state = causal_conv1d(
        x.mT, weight, bias, activation=activation, initial_state=initial_states, return_final_state=True
    )
    if not return_final_states:
        return y.mT
    return y.mT, state.to(x.dtype) if final_states_out is None else final_states_out.copy_(state)


@serves(partly={"activation": NAMED})
@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution from `conv_state` on, which is updated in place; it has no gradient.

    x [B, D], or [B, D, L] for L tokens, one after the other; conv_state [B, D, S] with S >= W-1, the tokens
    before, the latest last. cache_seqlens int32 [B], how many tokens there have been: conv_state is a ring
    then, and token number p lies in it at p mod S. conv_state_indices int32 [B]: row b has the state
    conv_state[conv_state_indices[b]], -1 is padding, which gives 0 and has none. Returns y shaped like x, in
    its dtype. Raises ValueError where an argument does not fit.
    """
    op, sizes = "causal_conv1d_update", {}
    several = checks.axes(op, "x", x) == 3
    checks.shape(op, "x", x, "B D L" if several else "B D", sizes)
    checks.shape(op, "weight", weight, "D W", sizes)
    if bias is not None:
        checks.shape(op, "bias", bias, "D", sizes)
    checks.parameters(op, x, x=x, conv_state=conv_state, weight=weight, bias=bias)
    rows = "B D S" if conv_state_indices is None else "states D S"
    checks.shape(op, "conv_state", conv_state, rows, sizes)
    checks.written(op, conv_state=conv_state)
    if sizes["S"] < sizes["W"] - 1:
        checks.refuse(op, "conv_state", f"of at least W-1={sizes['W'] - 1} tokens", tuple(conv_state.shape))
    activation = activation_of(op, activation)
    options = {}
    if cache_seqlens is not None:
        checks.integers(op, "cache_seqlens", cache_seqlens, x, sizes)
        options["positions"] = cache_seqlens
    if conv_state_indices is not None:
        check_rows(op, "conv_state_indices", conv_state_indices, x, sizes["states"], sizes)
        options["state_indices"] = conv_state_indices
    if not several:
        return causal_conv1d_step(x, weight, bias, state=conv_state, activation=activation, **options)
    tokens = []
    for t in range(sizes["L"]):
        if cache_seqlens is not None:
            options["positions"] = cache_seqlens + t
        step = causal_conv1d_step(x[..., t], weight, bias, state=conv_state, activation=activation, **options)
        tokens.append(step)
    return torch.stack(tokens, -1)


@serves()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` tokens of each of N packed sequences, zeros before those that are shorter.

    x [T, D]; cu_seqlens int32 or int64 [N+1]: sequence n is tokens cu_seqlens[n] to cu_seqlens[n+1]. Returns
    [N, D, state_len] in x's dtype. Raises ValueError where an argument does not fit.
    """
    op = "causal_conv1d_varlen_states"
    checks.shape(op, "x", x, "T D", {})
    checks.packing(op, cu_seqlens, x[None])
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.boundaries(op, cu_seqlens, x.shape[0])
    if state_len < 0:
        checks.refuse(op, "state_len", "at least 0", state_len)
    token = cu_seqlens[1:, None] + torch.arange(-state_len, 0, device=x.device)
    before = token < cu_seqlens[:-1, None]
    return x[token.clamp(min=0)].masked_fill(before[..., None], 0).mT
