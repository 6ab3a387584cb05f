"""One mixer fitted to what a layer's attention reads and gives: its last projection solved for, then all.

minimise over the mixer's parameters   |mixer(x) - y|^2 / |y|^2
"""

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from growth.errors import refuse
from growth.training.flops import CPU_ATTENTION
from growth.training.progress import RunProgress
from growth.transferring.mixers import Ridge
from lcikernels.layers import Retention

try:
    import resource
except ImportError:  # Windows
    resource = None

WIDTH = 128  # rates were found at widths of 96 to 192; what reads more learns slower (Yang et al. 2022)
DECAYS = 10.0  # those of heads are few, and far from where they start
WARMUP = 5
BETAS = 0.9, 0.95
CLIP = 1.0
TOKENS = 4  # of each feature that is solved for: with as many tokens as features, others err 5 times as much

Mixer = Callable[[Tensor], Tensor]


@dataclass
class Cost:
    """What a stage took: operations of matrix products, seconds, and the most bytes held by its end."""

    flops: int = 0
    seconds: float = 0.0
    memory: int = 0

    @contextmanager
    def counted(self, times: int = 1) -> Iterator[None]:
        """The operations inside count, so often."""
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            yield
        self.flops += times * counter.get_total_flops()

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.memory = peak_memory()


@dataclass(frozen=True)
class Pairs:
    """What a layer of the source reads and what its mixer gives, [N, T, hidden_size] each.

    ids: the windows, [N, T]; name: of the layer. Raises Refusal, which tells the windows by a checksum, where
    a number is not finite.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    name: str

    def __post_init__(self):
        finite = self.x.isfinite().flatten(1).all(1) & self.y.isfinite().flatten(1).all(1)
        if not finite.all():
            windows = (~finite).nonzero().flatten().tolist()
            self.refuse("the source", windows, "look for such numbers in the source's weights")

    def refuse(self, where: str, windows: Sequence[int], remedy: str) -> NoReturn:
        mark = zlib.crc32(self.ids[list(windows)].numpy())
        got = f"others on the windows {mark:08x}"
        raise refuse(f"align: {self.name}, {where}", "finite numbers", got, remedy)

    @cached_property
    def scale(self) -> float:
        """The mean square of y."""
        return max(self.y.square().mean().item(), torch.finfo(torch.float32).tiny)

    def loss(self, mixer: Mixer, windows: Sequence[int] | slice) -> Tensor:
        return (mixer(self.x[windows]) - self.y[windows]).square().mean() / self.scale

    def error(self, mixer: Mixer, size: int, cost: Cost) -> float:
        """The loss on the last `size` windows, which `solve` has not seen unless it has seen all.

        Raises Refusal where it is not finite.
        """
        with cost.counted(), torch.no_grad():
            error = self.loss(mixer, slice(-size, None)).item()
        if not math.isfinite(error):
            self.refuse("its new mixer", range(len(self.ids))[-size:], "choose a lower learning rate")
        return error


@torch.no_grad()
def solve(module: nn.Module, mixer: Mixer, pairs: Pairs, size: int, batches: int, cost: Cost) -> None:
    """The last projection that fits best on the first `batches` batches of `size` windows, by `Ridge`.

    More where these hold less than TOKENS tokens for each feature, as far as one batch is left out.
    """
    last: nn.Linear = module.o_proj if hasattr(module, "o_proj") else module.out_proj
    ridge = Ridge(last.in_features, last.out_features, last.bias is not None)
    wanted = -(-TOKENS * last.in_features // (size * pairs.x.shape[1]))
    batches = max(batches, min(wanted, len(pairs.x) // size - 1))
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda projection, given: seen.append(given[0]))
    for x, y in list(zip(pairs.x.split(size), pairs.y.split(size)))[:batches]:
        with cost.counted():
            mixer(x)
            ridge.add(seen.pop(), y)
    hook.remove()
    d = last.in_features
    cost.flops += d**3 // 3 + 2 * d * d * last.out_features  # Cholesky's factor, then two triangles
    W, b = ridge.solve()
    last.weight.copy_(W)
    if b is not None:
        last.bias.copy_(b)


@dataclass(frozen=True)
class Steps:
    """How many, of so many windows, at which highest rate, in the order of which seed."""

    count: int
    size: int
    rate: float
    seed: int

    def share(self, step: int) -> float:
        """Of the rate: a rise over WARMUP steps, then a line to 0."""
        return min((step + 1) / WARMUP, (self.count - step) / max(1, self.count - WARMUP))

    def windows(self, N: int) -> Iterator[list[int]]:
        """Of each step: all N in turn, then again in another order."""
        generator, left = torch.Generator().manual_seed(self.seed), []
        for _ in range(self.count):
            if len(left) < self.size:
                left = torch.randperm(N, generator=generator).tolist()
            yield left[: self.size]
            left = left[self.size :]


@torch.enable_grad()
def descend(
    module: nn.Module, mixer: Mixer, pairs: Pairs, steps: Steps, cost: Cost, progress: RunProgress
) -> None:
    """AdamW without weight decay on the parameters of `module`, which `mixer` calls.

    A matrix that reads more than WIDTH channels learns as much slower, a retention's decays DECAYS times as
    fast; gradients are clipped at CLIP. Raises Refusal where the loss is not finite.
    """
    parameters = [p.requires_grad_() for p in module.parameters()]
    groups = [{"params": [p], "lr": steps.rate * share_of_rate(module, p)} for p in parameters]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, steps.share)
    for step, windows in enumerate(steps.windows(len(pairs.x))):
        with nullcontext() if step else cost.counted(steps.count):
            loss = pairs.loss(mixer, windows)
            loss.backward()
        if not loss.isfinite():
            pairs.refuse(f"step {step + 1}", windows, "choose a lower learning rate")
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.advance()
    module.requires_grad_(False)


def share_of_rate(module: nn.Module, parameter: Tensor) -> float:
    """Which a parameter gets."""
    if isinstance(module, Retention) and parameter is getattr(module, "A_log", None):
        return DECAYS
    return min(1.0, WIDTH / parameter.shape[1]) if parameter.dim() > 1 else 1.0


def peak_memory() -> int:
    """The most bytes that the process has held so far; 0 where the system does not tell."""
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
