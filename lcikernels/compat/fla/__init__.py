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
argument here: a TypeError. The norms say their own.
"""

from lcikernels.compat.fla.norms import (
    layer_norm_gated,
    rms_norm_gated,
)
from lcikernels.compat.fla.retention import (
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_retention,
    parallel_retention,
)
from lcikernels.compat.fla.simple_gla import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
)

__all__ = [
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "layer_norm_gated",
    "parallel_retention",
    "parallel_simple_gla",
    "rms_norm_gated",
]
