"""How much memory an op takes on a GPU that is not here: tensors are on `meta`, launches do nothing."""

import weakref
from collections.abc import Iterable
from types import ModuleType

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


def without_launches(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType, processors: int, sm: int) -> None:
    """The launchers in `kernel` see a GPU of so many multiprocessors, and launch nothing, nor do copies."""
    from lcikernels.ops import views  # which needs Triton

    monkeypatch.setattr(kernel, "device", lambda x: (processors, sm))
    for module in (kernel, views):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches())
