"""The functions of fla.ops.simple_gla."""

from torch import Tensor

from lcikernels.compat.fla.attention import (
    CHUNK_SIZE,
    CU_SEQLENS_CPU,
    HEAD_FIRST,
    NOT_PACKED,
    RENAMED,
    attend,
    attend_in_parallel,
    v_first,
)
from lcikernels.compat.serving import serves


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
    """Linear attention with a decay for each head, each token, or both.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
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
    """Linear attention with a decay for each head, each token, or both.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
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
    """Linear attention with a decay for each head, each token, or both; reverse: from every last token on.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
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
    """Linear attention with a decay for each token. The second of the pair is the weights or None.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
    return attend_in_parallel("parallel_simple_gla", q, k, v, g, None, scale, output_attentions, cu_seqlens)
