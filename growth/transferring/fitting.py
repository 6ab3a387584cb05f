"""One mixer fitted to one layer's attention: by least squares in its last projection, then by descent in all of it.

    minimise over the mixer's parameters   |mixer(x) - attention(x)|^2 / |attention(x)|^2
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from growth.errors import refuse
from growth.training.flops import CPU_ATTENTION
from growth.transferring.mixers import Ridge

RATES = {"R": 2e-2, "M": 1e-2, "S": 1e-2}
WIDTH = 128  # found at widths of 96 to 192; a matrix that reads more learns as much slower (Yang et al. 2022)
WARMUP = 5
BETAS = 0.9, 0.95
CLIP = 1.0


@dataclass(frozen=True)
class Alignment:
    """How mixers are fitted.

    steps           of AdamW without weight decay; 0: only the output projection, by least squares
    batches         distinct ones, each used again and again
    batch_size      windows in each
    sequence_length tokens of a window; None: 512, or what the source has positions for
    learning_rate   the highest, reached after 5 steps, then linear to 0; None: by the kind of mixer, RATES
    ridge           batches that the output projection is solved for on before the steps
    """

    steps: int = 0
    batches: int = 8
    batch_size: int = 8
    sequence_length: int | None = None
    learning_rate: float | None = None
    ridge: int = 2

    def __post_init__(self):
        for name, least in (("steps", 0), ("batches", 1), ("batch_size", 1), ("ridge", 0)):
            if getattr(self, name) < least:
                what = "align" if name == "steps" else name.replace("_", "-")
                raise refuse(what, f"at least {least}", getattr(self, name), "choose a larger number")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise refuse("learning-rate", "more than 0, and finite", self.learning_rate, "leave it out")


@dataclass
class Cost:
    """What a stage took: operations of matrix products, and seconds."""

    flops: int = 0
    seconds: float = 0.0

    @contextmanager
    def counted(self, times: int = 1) -> Iterator[None]:
        """Operations inside count so often."""
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            yield
        self.flops += times * counter.get_total_flops()

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


@dataclass(frozen=True)
class Pairs:
    """What a layer of the source reads and what its attention gives, [N, T, hidden_size] each.

    ids: the windows [N, T]; name: of the layer, for refusals.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    name: str

    def __post_init__(self):
        for n, (x, y) in enumerate(zip(self.x, self.y)):
            if not (x.isfinite().all() and y.isfinite().all()):
                self.refuse("of the source", [n], "look for numbers that are not finite in the source")

    def refuse(self, where: str, windows: list[int], remedy: str):
        mark = zlib.crc32(self.ids[windows].cpu().numpy())
        raise refuse(f"{self.name} {where}", "finite numbers", f"others, on windows {mark:08x}", remedy)


def output(mixer: nn.Module) -> nn.Linear:
    """The last projection of a mixer."""
    return mixer.o_proj if hasattr(mixer, "o_proj") else mixer.out_proj


def error(out: Tensor, y: Tensor, scale: float) -> Tensor:
    return (out - y).square().mean() / scale


@torch.no_grad()
def solve(mixer: nn.Module, call: Callable[[Tensor], Tensor], pairs: Pairs, size: int, batches: int, cost: Cost) -> None:
    """The output projection that fits best on the first batches of that size."""
    last, seen = output(mixer), []
    ridge = Ridge(last.in_features, last.out_features, last.bias is not None)
    hook = last.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        for x, y in list(zip(pairs.x.split(size), pairs.y.split(size)))[:batches]:
            with cost.counted():
                call(x)
                ridge.add(seen.pop(), y)
    finally:
        hook.remove()
    d = last.in_features
    cost.flops += d**3 // 3 + 2 * d * d * last.out_features  # Cholesky, and the two triangles
    W, b = ridge.solve()
    last.weight.copy_(W)
    if b is not None:
        last.bias.copy_(b)


def descend(
    mixer: nn.Module,
    call: Callable[[Tensor], Tensor],
    pairs: Pairs,
    scale: float,
    rate: float,
    how: Alignment,
    seed: int,
    cost: Cost,
    step: Callable[[], None],
) -> None:
    """how.steps of AdamW on the mixer's parameters; windows come in an order drawn anew each time round."""
    parameters = [p.requires_grad_() for p in mixer.parameters()]
    groups = [{"params": [p], "lr": rate * (min(1.0, WIDTH / p.shape[1]) if p.dim() > 1 else 1.0)} for p in parameters]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / WARMUP, (how.steps - i) / max(1, how.steps - WARMUP)))
    for i, windows in zip(range(how.steps), orders(len(pairs.x), how.batch_size, seed)):
        with cost.counted(how.steps) if i == 0 else nullcontext():
            loss = error(call(pairs.x[windows]), pairs.y[windows], scale)
            loss.backward()
        if not loss.isfinite():
            pairs.refuse(f"of the target, step {i + 1}", windows, "choose a lower learning rate")
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step()
    mixer.requires_grad_(False)


def orders(N: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of `size` out of N windows, all of them in turn, without end."""
    generator, left = torch.Generator().manual_seed(seed), []
    while True:
        if len(left) < size:
            left = torch.randperm(N, generator=generator).tolist()
        yield left[:size]
        left = left[size:]
