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
