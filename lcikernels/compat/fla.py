"""fla's retention, simple gated linear attention, and gated norms (flash-linear-attention 0.6).

    S[t] = exp(g[t] + g_gamma) S[t-1] + k[t] ⊗ v[t],    o[t] = scale q[t] . S[t]

q, k [B, T, H, K], v [B, T, H, V]; g [B, T, H] and g_gamma [H] are logarithms, each 0 unless given, summed in
float32; the functions named after retention have RetNet's g_gamma, log(1 - 2^(-5-h)). scale: K ** -0.5 unless
given. initial_state [N, H, K, V], with state_v_first [N, H, V, K], as is the final state; N is B, or the
number of sequences that cu_seqlens (int32 or int64 [N+1], B = 1) packs into a row. The chunk_, fused_chunk_
and fused_recurrent_ functions are one computation, which chooses its own way.

All return a pair: o [B, T, H, V] in q's dtype, and the final state or None, float32 (float64 where q, k
or v is), which with state_v_first is a transposed view. float32, float64, bfloat16 and float16 may be mixed.
Gradients reach q, k, v, g, g_gamma (in fla it has none) and initial_state, from both outputs. Raises
ValueError where a shape, dtype or device does not fit. What fla takes through **kwargs and does not use is no
argument here: a TypeError. `rms_norm_gated` and `layer_norm_gated` say their own.
"""

import warnings

from torch import Tensor

from lcikernels.ops import checks

from .gated_norm import norm_gated
from .linear_attention import attend, attend_in_parallel, retnet_decays
from .serving import serves

HEAD_FIRST = {"head_first": "fla has removed it: tensors are [B, T, H, ...]"}
CHUNK_SIZE = {"chunk_size": "it sets how fla computes"}
CU_SEQLENS_CPU = {"cu_seqlens_cpu": "a copy of cu_seqlens"}
RENAMED = {"transpose_state_layout": "the deprecated name of state_v_first, not beside it"}
NOT_PACKED = {"output_attentions": "without cu_seqlens, as in fla"}


@serves(refused=HEAD_FIRST, free=CHUNK_SIZE)
def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    head_first: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention with RetNet's decays."""
    g_gamma = retnet_decays("chunk_retention", q)
    return attend(
        "chunk_retention",
        *(q, k, v, None, g_gamma, scale, initial_state, output_final_state, cu_seqlens),
    )


@serves()
def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention with RetNet's decays."""
    g_gamma = retnet_decays("fused_chunk_retention", q)
    return attend(
        "fused_chunk_retention",
        *(q, k, v, None, g_gamma, scale, initial_state, output_final_state, cu_seqlens),
    )


@serves(partly=RENAMED)
def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention with RetNet's decays; reverse: from the last token of every sequence to its first."""
    op = "fused_recurrent_retention"
    state_v_first = v_first(op, state_v_first, transpose_state_layout)
    g_gamma = retnet_decays(op, q)
    return attend(
        op,
        *(q, k, v, None, g_gamma, scale, initial_state, output_final_state, cu_seqlens),
        state_v_first=state_v_first,
        reverse=reverse,
    )


@serves(partly=NOT_PACKED)
def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retention with RetNet's decays. The second of the pair is the weights or None: see `weights`."""
    g_gamma = retnet_decays("parallel_retention", q)
    return attend_in_parallel(
        "parallel_retention", q, k, v, None, g_gamma, scale, output_attentions, cu_seqlens
    )


@serves(refused=HEAD_FIRST, free=CHUNK_SIZE | CU_SEQLENS_CPU)
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    head_first: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a decay for each head, each token, or both."""
    return attend(
        "chunk_simple_gla",
        *(q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens),
        state_v_first=state_v_first,
    )


@serves()
def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a decay for each head, each token, or both."""
    return attend(
        "fused_chunk_simple_gla",
        *(q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens),
    )


@serves(partly=RENAMED)
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a decay for each head, each token, or both; reverse: from every last token on."""
    op = "fused_recurrent_simple_gla"
    return attend(
        op,
        *(q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens),
        state_v_first=v_first(op, state_v_first, transpose_state_layout),
        reverse=reverse,
    )


@serves(partly=NOT_PACKED, free=CU_SEQLENS_CPU)
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a decay for each token. The second of the pair is the weights or None."""
    return attend_in_parallel("parallel_simple_gla", q, k, v, g, None, scale, output_attentions, cu_seqlens)


def v_first(op: str, state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    """state_v_first, also under its old name."""
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        checks.refuse(op, "transpose_state_layout", "left out where state_v_first is given", "both")
    said = f"{op}: transpose_state_layout is deprecated, state_v_first is its name"
    warnings.warn(said, DeprecationWarning, stacklevel=4)  # the caller of the decorated function
    return transpose_state_layout


@serves()
def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """The RMS norm of x + residual, times weight, plus bias, times activation(g): see `norm_gated`."""
    arguments = (x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)
    return norm_gated("rms_norm_gated", "rms", *arguments)


@serves()
def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """The layer norm of x + residual, times weight, plus bias, times activation(g): see `norm_gated`."""
    arguments = (x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)
    return norm_gated("layer_norm_gated", "layer", *arguments)
