"""Which kernels an op launches, with which arguments: its launchers run with kernels that only note them."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import process_time
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from lcikernels.ops import views

SM_90, CALLS = GPUTarget("cuda", 90, 32), 200
EMPTY = ("aten::empty", "aten::new_empty")


class Launch(NamedTuple):
    """A kernel with the arguments, options and grid of one launch; what: which case of which op."""

    what: str
    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]
    grid: tuple[int, int, int]


class Noted(NamedTuple):
    """Launches of Triton's kernels, and bytes read and written by each of torch's."""

    kernels: list[Launch]
    torch: list[int]


class Noting:
    """In a kernel's place. `launched(launch)` is told of each call."""

    def __init__(self, kernel: JITFunction, what: str, launched: Callable[[Launch], None]):
        self.kernel, self.what, self.launched = kernel, what, launched

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            names = self.kernel.arg_names
            named = dict(zip(names, arguments)) | {x: options.pop(x) for x in names if x in options}
            sizes = grid(named) if callable(grid) else grid
            self.launched(Launch(self.what, self.kernel, named, options, (*sizes, 1, 1)[:3]))

        return launch


class Counting(TorchDispatchMode):
    """Notes what torch computes or copies; views and new memory are no launches."""

    def __init__(self, bytes: list[int]):
        super().__init__()
        self.bytes = bytes

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        if not function.is_view and not function.name().startswith(EMPTY):
            tensors = [u for u in tree_leaves((arguments, options, result)) if isinstance(u, Tensor)]
            self.bytes.append(sum(u.numel() * u.element_size() for u in tensors))
        return result


def modules(package: str) -> list[ModuleType]:
    """Of an op; and where what copies is."""
    root = importlib.import_module(package)
    names = [x.name for x in pkgutil.iter_modules(root.__path__, f"{package}.") if not x.name.endswith("cpp")]
    return [*map(importlib.import_module, names), views]


@contextmanager
def replaced(places: list[ModuleType], by: Callable[[str, object], object]) -> Iterator[None]:
    """Every global of these modules is what `by(name, it)` makes of it."""
    kept = [(place, name, x, by(name, x)) for place in places for name, x in vars(place).items()]
    kept = [(place, name, x, other) for place, name, x, other in kept if other is not x]
    for place, name, _, other in kept:
        setattr(place, name, other)
    try:
        yield
    finally:
        for place, name, x, _ in kept:
            setattr(place, name, x)


@contextmanager
def stubbed(
    package: str, chip: tuple[int, int], stub: Callable[[JITFunction], object], others: dict[str, Callable]
) -> Iterator[None]:
    """The op's kernels are stubs; `device` says so many multiprocessors and 10 times the compute capability.

    others: functions of the package by name, replaced as well.
    """

    def by(name: str, x: object) -> object:
        if isinstance(x, JITFunction) and name.endswith("_kernel"):
            return stub(x)
        if name == "device" and callable(x):
            return lambda _: chip
        return others.get(name, x) if callable(x) else x

    with replaced(modules(package), by):
        yield


def noted(
    package: str, what: str, chip: tuple[int, int], call: Callable, others: dict[str, Callable]
) -> Noted:
    """What `call` launches on a GPU of so many multiprocessors."""
    found = Noted([], [])
    with (
        stubbed(package, chip, lambda x: Noting(x, what, found.kernels.append), others),
        Counting(found.torch),
    ):
        call()
    return found


class Binding:
    """In a kernel's place: what Triton does with the arguments of each call before it launches."""

    def __init__(self, kernel: JITFunction):
        self.bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(SM_90))

    def __getitem__(self, grid):
        return self.bind


def made(x: Tensor, *size, dtype: torch.dtype | None = None) -> Tensor:
    """x.new_empty, whose kernel for `meta` is Python: 3.8 us instead of 1.0."""
    return torch.empty(*size, dtype=dtype or x.dtype, device=x.device)


def host(package: str, call: Callable, others: dict[str, Callable]) -> float:
    """Seconds that Python takes for a call whose launches do not reach a GPU, those of `Binding` included."""
    with stubbed(package, (132, 90), Binding, others), patch.object(Tensor, "new_empty", made):
        times = []
        for _ in range(CALLS):
            start = process_time()
            call()
            times.append(process_time() - start)
    return median(times)


def flat(arguments: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Arguments as Triton names them in its IR: parts of a tuple by theirs."""
    named = {}
    for name, x in arguments.items():
        if isinstance(x, tuple):
            parts = x._asdict() if hasattr(x, "_fields") else {str(i): part for i, part in enumerate(x)}
            named |= flat(parts, f"{prefix}{name}.")
        else:
            named[prefix + name] = x.base if isinstance(x, TensorDescriptor) else x
    return named
