"""The demo's images: 1797 handwritten digits of 8 x 8 pixels, which come with scikit-learn.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig

from growth.demo.arms import Arms
from growth.demo.budgets import Group, Size
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


class Digits(Arms):
    """ViTs of handwritten digits."""

    prefix = "vit-"
    auto = AutoModelForImageClassification
    unit = "nats an image"

    def __init__(self, numbers: Group, out: Path, console: Console, seed: int):
        super().__init__(numbers, out, console, seed, *digits(numbers.held_out))

    def report(self) -> dict:
        numbers = self.numbers
        source = self.scratch("vit-source", vit(numbers.source), numbers.training)
        scratch = self.scratch("vit-scratch", vit(numbers.target), numbers.growing)
        arms = [scratch, *self.grown("vit-source", ("lemon", "ligo"), scratch)]
        return {"name": "images", "unit": self.unit, "source": source, "arms": arms}

    def told(self, model: PreTrainedModel) -> dict:
        return {"accuracy": self.held_out.accuracy(model)}


def vit(size: Size) -> ViTConfig:
    """A ViT of digits, 16 patches of 2 x 2 pixels; weights of about 1 / sqrt(width)."""
    return ViTConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        initializer_range=0.1,
    )
