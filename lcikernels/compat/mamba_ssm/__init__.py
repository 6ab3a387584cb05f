"""mamba-ssm's functions, as published in 2.3: [B, D, L] tensors go to the ops as [B, L, D] views of them.

Tensors of one dtype are read as they are; of several, all are computed in float32 (float64 where one of them
is) and the result has u's, or x's. States that are returned are float32. Where mamba-ssm gives no gradient,
to the states and to the norms' weights, there is one here.
"""

from lcikernels.compat.mamba_ssm.heads import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from lcikernels.compat.mamba_ssm.inner import mamba_inner_fn
from lcikernels.compat.mamba_ssm.norms import layernorm_fn, rmsnorm_fn
from lcikernels.compat.mamba_ssm.scan import selective_scan_fn
from lcikernels.compat.mamba_ssm.step import selective_state_update

__all__ = [
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
