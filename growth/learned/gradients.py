"""Outgoing weights of new neurons from the gradients of a few batches: what GradMax asks for.

    x [N, D]  what a feed-forward block reads      g [N, D]  the loss's gradient by what it writes

The source is in memory whole, in float32, without dropout. Of a gated block at most TOKENS rows of x and g
are kept, drawn at random, an equal share of each batch; else their product, [D, D], alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from growth.architecture import Weight
from growth.errors import refuse
from growth.expand import Expand, named_seed
from growth.learned.blocks import Block, Live, blocks_of, refuse_shifting
from growth.learned.fit import examples_for
from growth.loading import load_model, quiet
from growth.plan import Recipe, Source
from growth.training.data import collator

if TYPE_CHECKING:
    from growth.growing import Growth

TOKENS = 8192  # of a layer: 2 x 25 MB at a width of 768
ROUNDS = 60  # of the iteration: two singular values 10 % apart are told apart by 1.1^120


class Outgoing:
    """A Learner: `fit` takes gradients, `recipe` writes what follows from them."""

    def __init__(self, growth: "Growth"):
        method, source = growth.method, growth.source
        self.growth, self.method, self.source = growth, method, source
        length, size = method.sequence_length, method.batch_size
        how = {"windows": method.batches * size, "seed": growth.seed}
        self.examples = examples_for(source, method.data, size, length, method.name, **how)
        self.collate = collator(source.model.auto, source.checkpoint.path)
        self.blocks = tuple(blocks_of(growth.target.architecture, set(growing(growth))))
        self.table = growth.target.table()
        self.made: dict[tuple[str, int], Tensor] = {}  # new columns of down, new rows of gates

    def recipe(self, name: str) -> Recipe | None:
        """Of what writes new neurons' output, and of their gates."""
        entry, layer = self.table[name]
        if not any(weight.name in (x.down, x.gate) for weight in entry.weights for x in self.blocks):
            return None
        old, new = self.source.model.architecture, self.growth.target.architecture
        expand = Expand(entry, layer, self.growth.maps, old, new, self.growth.seed)

        def make(source: Source) -> Iterator[Tensor]:
            yield entry.to_disk([self.wide(expand, source, weight) for weight in entry.weights])

        return make

    def wide(self, expand: Expand, source: Source, weight: Weight) -> Tensor:
        """The wide weight with what is new in its place."""
        x = expand.expanded(expand.mixed(source, weight), weight)
        made = self.made.get((weight.name, expand.layer))
        if made is None:
            return x
        if weight.wires[-1] in growing(self.growth):
            return torch.cat([x[:, : -made.shape[1]], made.to(x.dtype)], 1)
        return torch.cat([x[: -len(made)], made.to(x.dtype)])

    def fit(self) -> tuple[int, dict[str, Any]]:
        """The operations of forward and backward, and the data."""
        with quiet():
            model = load_model(self.source.checkpoint.path).eval().requires_grad_(False)
        blocks = [Live(model, self.source, names) for names in self.blocks]
        with quiet(), FlopCounterMode(display=False) as counter:  # transformers names GPT-2's loss as unknown
            refuse_shifting(model, blocks[0], next(self.batches()))
            seen = self.watched(model, blocks)
            for block in blocks:
                self.settle(block, *seen.pop(block.names))
        told = {"data": self.examples.fingerprint(), "sequence_length": self.examples.length}
        return counter.get_total_flops(), told

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches that are asked, the same each time, a masked model's masked by their numbers; fewer
        where the data end."""
        size, examples = self.method.batch_size, self.examples
        for first in range(0, min(self.method.batches * size, len(examples) // size * size), size):
            chosen = range(first, first + size)
            rows = (examples[i] for i in chosen)
            yield self.collate([*rows], seed=first) if self.collate else examples.batch(chosen)

    def watched(self, model: nn.Module, blocks: list[Live]) -> dict[Block, tuple[Tensor, Tensor | None]]:
        """Of each block x and g, or of a block without gates the sum of x gᵀ and nothing."""
        kept: dict[Block, list] = {block.names: [] for block in blocks}
        generator, share = self.generator("tokens"), max(1, TOKENS // self.method.batches)
        for batch in self.batches():
            with ExitStack() as hooks:
                pairs = {block.names: hooks.enter_context(block.watching()) for block in blocks}
                (loss := model(**batch).loss).backward()
            if not loss.isfinite():
                expected, remedy = "a finite loss of the source", "look for numbers that are not finite in it"
                raise refuse("gradmax", expected, loss.item(), remedy)
            for block, (x, probe) in pairs.items():
                x, g = x.flatten(0, -2), probe.grad.flatten(0, -2)
                if block.gate:
                    some = torch.randperm(len(x), generator=generator)[:share]
                    kept[block].append((x[some], g[some]))
                else:
                    kept[block] = [(sum((before for before, _ in kept[block]), x.T @ g), None)]
        return {
            block: tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*found))
            for block, found in kept.items()
        }

    def settle(self, block: Live, x: Tensor, g: Tensor | None) -> None:
        """New columns of down, and new rows of the gate."""
        names, new = block.names, self.growth.target.architecture
        lengths = self.source.read(names.down, names.layer).norm(dim=0)
        k = new.wires[new.layered[names.down].wires[-1]].size - len(lengths)
        generator = self.generator(names.down.format(names.layer))
        if names.gate:
            gates = torch.randn(k, x.shape[1], generator=generator) * new.init_std
            columns = leading(block.activated(x @ gates.T), x, g, generator)
            self.made[names.gate, names.layer] = gates
        else:
            columns = top(x, k, generator)
        length = lengths.max() if self.method.outgoing == "max" else lengths.mean()
        self.made[names.down, names.layer] = columns * length

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(named_seed(self.growth.seed, f"gradmax {name}"))


def top(M: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """[D, k]: the first right singular vectors of M [E, D], and any directions beyond the D there are."""
    right = torch.linalg.svd(M.double(), full_matrices=True).Vh[:k].T.float()
    more = torch.randn(M.shape[1], k - right.shape[1], generator=generator)
    return torch.cat([right, more / more.norm(dim=0)], 1)


def leading(opened: Tensor, x: Tensor, g: Tensor, generator: torch.Generator) -> Tensor:
    """[D, k]: column i is the first right singular vector of sum_n opened[n, i] x[n] g[n]ᵀ, by iteration."""
    g = g / g.abs().max().clamp(min=torch.finfo(g.dtype).tiny)  # of a mean over many tokens, they are small
    columns = torch.randn(g.shape[1], opened.shape[1], generator=generator)
    for _ in range(ROUNDS):
        columns = g.T @ (opened * (x @ (x.T @ (opened * (g @ columns)))))
        columns /= columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
    return columns


def growing(growth: "Growth") -> list[str]:
    """The wires that grow, those of layers without their numbers."""
    old, new = growth.source.model.architecture, growth.target.architecture
    return [name for name, wire in old.growing.items() if new.wires[name] != wire]
