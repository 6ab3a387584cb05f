"""The functions of fla.ops.retention."""

from torch import Tensor

from lcikernels.compat.fla.attention import (
    CHUNK_SIZE,
    HEAD_FIRST,
    NOT_PACKED,
    RENAMED,
    attend,
    attend_in_parallel,
    retnet_decays,
    v_first,
)
from lcikernels.compat.serving import serves


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
    """Retention with RetNet's decays.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
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
    """Retention with RetNet's decays.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
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
    """Retention with RetNet's decays; reverse: from the last token of every sequence to its first.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
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
    """Retention with RetNet's decays. The second of the pair is the weights or None: see `weights`.

    Equation, shapes, results and errors are those of `lcikernels.compat.fla`.
    """
    g_gamma = retnet_decays("parallel_retention", q)
    return attend_in_parallel(
        "parallel_retention", q, k, v, None, g_gamma, scale, output_attentions, cu_seqlens
    )
