"""Images and their classes, as an image classifier learns from them."""

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from growth.errors import refuse
from growth.training.curve import class_logits, image_losses
from growth.training.examples import Examples


class Images(Examples):
    """pixel_values [N, C, H, W] float32, as the model's image processor makes them; labels [N] int64.

    Item i is {"pixel_values": [C, H, W], "labels": []}. Raises Refusal where a shape or dtype differs, where
    there are none, and where a pixel is not finite.
    """

    unit = "images"

    def __init__(self, pixel_values: Tensor, labels: Tensor):
        for name, x, axes, dtype in (
            ("pixel_values", pixel_values, "N, C, H, W", torch.float32),
            ("labels", labels, "N", torch.int64),
        ):
            if x.dim() != len(axes.split()) or x.dtype != dtype:
                got = f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
                kind = str(dtype).removeprefix("torch.")
                raise refuse(name, f"[{axes}], {kind}", got, "reshape or convert them")
        if not len(pixel_values) == len(labels) > 0:
            got = f"{len(pixel_values)} and {len(labels)}"
            raise refuse("pixel_values, labels", "at least one image, and a label for each", got, "pair them")
        if not pixel_values.isfinite().all():
            raise refuse("pixel_values", "finite numbers", "some that are not", "look for NaN in them")
        self.pixel_values, self.labels = pixel_values.contiguous(), labels.contiguous()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        chosen = list(indices)
        return {"pixel_values": self.pixel_values[chosen], "labels": self.labels[chosen]}

    def at(self, indices: Tensor) -> "Images":
        return Images(self.pixel_values[indices], self.labels[indices])

    def fingerprint(self) -> str:
        crc = 0
        for x in (self.pixel_values, self.labels):
            crc = zlib.crc32(x.numpy(), crc)
        return f"{self}, {crc:08x}"

    def losses(self, model: nn.Module) -> Tensor:
        return image_losses(model, self.pixel_values, self.labels)

    def accuracy(self, model: nn.Module) -> float:
        """The share of the images whose class has the largest logit."""
        return (class_logits(model, self.pixel_values).argmax(1) == self.labels).float().mean().item()

    def refuse_foreign(self, config: PreTrainedConfig, what: str = "data") -> None:
        size = config.image_size
        expected = (config.num_channels, *((size, size) if isinstance(size, int) else size))
        if (got := tuple(self.pixel_values.shape[1:])) != expected:
            raise refuse(what, f"images of {expected}, as the model takes", got, "use its image processor")
        for label in (self.labels.max().item(), self.labels.min().item()):
            if not 0 <= label < config.num_labels:
                remedy = "use the model's labels, or give it more"
                raise refuse(what, f"labels below the model's {config.num_labels}", label, remedy)
