"""Rotary positions (Su et al. 2021) on the first dims of each head, halves paired as GPT-NeoX pairs them."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, dims: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions[t] * theta ** (-2i / dims), i = 0 .. ceil(dims / 2) - 1.

    positions [B, T], integers.  Returns two [B, T, 1, ceil(dims / 2)] in `dtype`, computed in float32.
    """
    steps = torch.arange(0, dims, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, :, None, None].float() * (1.0 / theta ** (steps / dims))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + P]), i < P, by their angle; dims from 2P on stay as they are.

    x [B, T, H, K], cos and sin [B, T, 1, P] with 2P <= K.  Returns [B, T, H, K] in x's dtype.
    """
    P = cos.shape[-1]
    a, b, rest = x[..., :P], x[..., P : 2 * P], x[..., 2 * P :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


def sequence_of(cu_seqlens: Tensor, T: int) -> Tensor:
    """The number of the packed sequence that each of T tokens belongs to, int64 [T]; N past the last one."""
    ends = cu_seqlens[1:].contiguous()
    return torch.searchsorted(ends, torch.arange(T, device=ends.device, dtype=ends.dtype), right=True)


def positions_of(
    B: int, T: int, start: Tensor | None, cu_seqlens: Tensor | None, keep: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions [B, T] of tokens that count on from `start` [B] (None: 0), and where the next ones start [B].

    cu_seqlens [N+1], where given: N packed sequences count each by itself, and starts are [N]. keep bool
    [B, T], where given: the kept tokens alone are counted.
    """
    tokens = torch.arange(T, device=device)
    if cu_seqlens is not None:
        N = cu_seqlens.shape[0] - 1
        start = tokens.new_zeros(N) if start is None else start
        # clamp: boundaries that stop short of T are the ops' to refuse
        sequence = sequence_of(cu_seqlens, T).clamp(max=N - 1)
        offset = start - cu_seqlens[:-1]
        return (tokens + offset[sequence])[None], start + cu_seqlens.diff()
    start = tokens.new_zeros(B) if start is None else start
    if keep is None:
        return tokens + start[:, None], start + T
    counted = keep.cumsum(1)
    return (counted - 1).clamp(min=0) + start[:, None], start + counted[:, -1]
