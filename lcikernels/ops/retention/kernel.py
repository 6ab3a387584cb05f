"""Retention in Triton: one token. A program owns BV columns of one head's state.

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import contiguous
from ..curves import LOG2E
from ..launch import options

BK, BV = 512, 32  # at most: all loads of a tile are on their way before the first store


@triton.jit
def step_kernel(
    p_q, p_k, p_v, p_decay, p_state, p_o, decay_row, scale, Hq, Hk, Hv, H, K, V,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(V, BV)
    i_v, i_h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    i_b = (tl.program_id(0) // tiles // H).to(tl.int64)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    decay = tl.math.exp2(tl.load(p_decay + i_b * decay_row + i_h) * LOG2E)
    v = tl.load(p_v + (i_b * Hv + i_h // (H // Hv)) * V + o_v, m_v, 0.0).to(tl.float32)
    p_q += (i_b * Hq + i_h // (H // Hq)) * K
    p_k += (i_b * Hk + i_h // (H // Hk)) * K
    p_state += (i_b * H + i_h) * K * V
    o = tl.zeros([BV], tl.float32)
    for first in range(0, K, BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < K
        q = tl.load(p_q + o_k, m_k, 0.0).to(tl.float32)
        k = tl.load(p_k + o_k, m_k, 0.0).to(tl.float32)
        o_s, m_s = o_k[:, None] * V + o_v[None, :], m_k[:, None] & m_v[None, :]
        S = tl.load(p_state + o_s, m_s, 0.0) * decay + k[:, None] * v[None, :]
        tl.store(p_state + o_s, S, m_s)
        o += tl.sum(q[:, None] * S, 0)
    tl.store(p_o + (i_b * H + i_h) * V + o_v, (o * scale).to(p_o.dtype.element_ty), m_v)


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    """o [B, H, V]; `state` is updated in place."""
    q, k, v, log_decay, whole = map(contiguous, (q, k, v, log_decay, state))
    B, H, K, V = state.shape
    o, decay_row = torch.empty(B, H, V, dtype=v.dtype, device=v.device), H if log_decay.dim() == 2 else 0
    rows, columns = min(BK, triton.next_power_of_2(K)), min(BV, triton.next_power_of_2(V))
    step_kernel[(B * H * triton.cdiv(V, columns),)](
        q, k, v, log_decay, whole, o, decay_row, scale, q.shape[1], k.shape[1], v.shape[1], H, K, V,
        rows, columns, **options(min(8, max(1, rows * columns // 1024))),
    )  # fmt: skip
    if whole is not state:
        state.copy_(whole)
    return o
