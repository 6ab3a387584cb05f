"""How much memory an op takes on a GPU that is not here: tensors are on `meta`, launches do nothing. Fences
around what kernels touch: Triton's interpreter reads and writes where they do."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """Bytes of the storages that live, the most that have, and each that was made."""

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        """held: what is there before."""
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held}
        self.most = sum(self.sizes.values())
        self.made: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.made.append(storage.nbytes())
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return out


class Launches:
    """Takes any launch, and does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


FENCE = 4096  # elements


def fenced(x: torch.Tensor, around: float) -> torch.Tensor:
    """A copy of x, dense, in memory that begins and ends with numbers `around`; a leaf, as x is."""
    memory = torch.full((x.numel() + 2 * FENCE,), around, dtype=x.dtype)
    inside = memory[FENCE : FENCE + x.numel()].view(x.shape)
    return inside.copy_(x.detach()).requires_grad_(x.requires_grad)


@contextmanager
def fences() -> Iterator[None]:
    """What launchers make by `new_empty` is full of sevens, and so must stay what is around it."""
    empty, kept = torch.Tensor.new_empty, []

    def fenced_empty(x, *size, dtype=None, **named):
        shape = size[0] if size and not isinstance(size[0], int) else size
        count = torch.Size(shape).numel()
        memory = empty(x, count + 2 * FENCE, dtype=dtype, **named).fill_(7)
        kept.append(memory)
        return memory[FENCE : FENCE + count].view(shape)

    with patch.object(torch.Tensor, "new_empty", fenced_empty):
        yield
    assert kept and all((x[:FENCE] == 7).all() and (x[-FENCE:] == 7).all() for x in kept)


def without_launches(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType, processors: int, sm: int) -> None:
    """The launchers in `kernel` see a GPU of so many multiprocessors, and launch nothing, nor do copies."""
    from lcikernels.ops import views  # which needs Triton

    monkeypatch.setattr(kernel, "device", lambda x: (processors, sm))
    for module in (kernel, views):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches())
