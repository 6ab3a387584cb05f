"""The demo's images: 1797 handwritten digits of 8 x 8 pixels, which come with scikit-learn.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
"""

import importlib.util

import torch
import torch.nn.functional as F

from growth.demo.scales import Distorted
from growth.training.images import Images

MISSING = "scikit-learn, which has the digits, is not installed: pip install scikit-learn"


def there() -> bool:
    return importlib.util.find_spec("sklearn") is not None


def digits(held_out: int, asked: Distorted | None = None) -> tuple[Images, Images]:
    """Those to train on, and `held_out` others; pixels from -1 to 1. The first are there in their nine places
    one pixel around their own, the others as they are; or both distorted."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    train, held = Images(pixels, torch.tensor(found.target)).hold_out(held_out, seed=0)
    if asked:
        return distorted(train, asked.copies, seed=0), distorted(held, asked.measured, seed=1)
    wide = F.pad(train.pixel_values, (1, 1, 1, 1), value=-1.0)
    moved = torch.cat([wide[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    return Images(moved, train.labels.repeat(9)), held


def distorted(images: Images, copies: int, seed: int) -> Images:
    """Each `copies` times: turned and sheared by up to 20 and 11 degrees, scaled by up to a fifth either way,
    moved by up to a pixel."""
    generator, count = torch.Generator().manual_seed(seed), copies * len(images)
    most = torch.tensor([0.35, 0.2, 0.2, 0.2, 0.25, 0.25])[:, None]
    angle, shear, wide, high, right, down = most * (2 * torch.rand(6, count, generator=generator) - 1)
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([cos * (1 + wide), shear - sin, right]), torch.stack([sin, cos * (1 + high), down])]
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), [count, 1, 8, 8], align_corners=False)
    ink = images.pixel_values.repeat(copies, 1, 1, 1) + 1  # what comes from outside is 0, no ink
    return Images(F.grid_sample(ink, grid, align_corners=False) - 1, images.labels.repeat(copies))
