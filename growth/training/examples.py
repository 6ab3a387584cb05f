"""What a model learns from: examples, each a few tensors under the names that a model takes them by."""

from collections.abc import Iterable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from growth.errors import refuse


class Examples(Dataset):
    """Item i is a dict of the i-th example's tensors, by the names that a model takes them by.

    unit: what one is called, in the plural. length: tokens of each, None where it has none.
    """

    unit: ClassVar[str]
    length: int | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """The examples of those indices as one batch."""
        raise NotImplementedError

    def at(self, indices: Tensor) -> Self:
        """Those examples alone."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """How many they are, and a checksum of them."""
        raise NotImplementedError

    def losses(self, model: nn.Module) -> Tensor:
        """A model's mean loss on each example, [N], in nats a prediction."""
        raise NotImplementedError

    def refuse_foreign(self, config: PreTrainedConfig, what: str = "data") -> None:
        """Raises Refusal where they are none that such a model takes."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[0] for name, x in self.batch([index]).items()}

    def __str__(self) -> str:
        return f"{len(self)} {self.unit}"

    def hold_out(self, count: int, seed: int = 0) -> tuple[Self, Self]:
        """All without `count` of them, and those; the same for the same seed."""
        order = self._order(seed)
        return self.at(order[count:].sort().values), self.at(order[:count])

    def sample(self, count: int, seed: int = 0) -> Self:
        """`count` of them, or all where there are fewer; the same for the same seed."""
        return self.at(self._order(seed)[:count])

    def refuse_unfit(
        self, batch_size: int, config: PreTrainedConfig, *, processes: int = 1, held_out: int = 0
    ) -> None:
        """Raises Refusal where they are less than a batch on each process, or none that such a model takes.

        held_out: how many were taken out before.
        """
        if len(self) < batch_size * processes:
            each = f" on each of {processes} processes" if processes > 1 else ""
            long = f" of {self.length} tokens" if self.length else ""
            raise refuse(
                "data",
                f"at least one batch{each}, {batch_size * processes} {self.unit}{long}",
                str(self) + (f" besides {held_out} held out" if held_out else ""),
                f"give more, or a smaller batch size{' or sequence length' if self.length else ''}",
            )
        self.refuse_foreign(config)

    def _order(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
