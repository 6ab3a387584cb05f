"""How alike what goes into a layer and what comes out of it are.

cosine   mean over tokens of cos(x, y); 1 - cosine is ShortGPT's block influence (Men et al. 2024, eq. 1)
cka      |Y^T X|^2 / (|X^T X| |Y^T Y|), Frobenius norms, channels centred over the tokens: linear CKA
         (Kornblith et al. 2019, eq. 2 and 3)
ratio    mean y^2 / mean x^2
added    mean over tokens of |y - x| / |x|
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def likeness(x: Tensor, y: Tensor) -> dict[str, float]:
    """x, y [.., D]: the stream before and behind a layer."""
    x, y = (part.flatten(0, -2).double() for part in (x, y))
    return {
        "cosine": F.cosine_similarity(x, y).mean().item(),
        "cka": linear_cka(x, y),
        "ratio": (y.square().mean() / x.square().mean()).item(),
        "added": ((y - x).norm(dim=1) / x.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)).mean().item(),
    }


def linear_cka(x: Tensor, y: Tensor) -> float:
    """x [N, D], y [N, E] of the same N tokens; from 0 to 1, and 1 for a rotation times a number."""
    x, y = (part - part.mean(0) for part in (x, y))
    within = (x.T @ x).norm() * (y.T @ y).norm()
    return ((y.T @ x).square().sum() / within.clamp(min=torch.finfo(x.dtype).tiny)).item()
