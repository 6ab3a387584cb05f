"""The demo's images: 1797 handwritten digits of 8 x 8 pixels, which come with scikit-learn.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
"""

import importlib.util

import torch
import torch.nn.functional as F

from growth.training.images import Images

MISSING = "scikit-learn, which has the digits, is not installed: pip install scikit-learn"


def there() -> bool:
    return importlib.util.find_spec("sklearn") is not None


def digits(held_out: int, seed: int = 0) -> tuple[Images, Images]:
    """Those to train on, each in its nine places one pixel around its own, and `held_out` others as they are;
    pixels from -1 to 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    train, held = Images(pixels, torch.tensor(found.target)).hold_out(held_out, seed)
    wide = F.pad(train.pixel_values, (1, 1, 1, 1), value=-1.0)
    moved = torch.cat([wide[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    return Images(moved, train.labels.repeat(9)), held
