"""The large model, whose only parameters are an operator's.

Every block of the large model makes its weights when it runs. Where the expansion `remakes`, that is inside a
checkpoint: they are freed behind it and made again in the backward, so that the wide weights of one block are
in memory at a time. Else they are held, as what the block computes is, and a step makes nothing twice. Wide
embeddings and heads are never made at all: a row of the small table is widened after it is looked up, and
what the head reads is narrowed first,

    embed(ids) = small(ids) · Bᵀ            logits = (x · A) · smallᵀ
"""

import copy
from collections.abc import Callable, Iterator

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from growth.architecture import Weight
from growth.families.stored import Entry
from growth.families.table import Model
from growth.learned.operator import Operator, exactly
from growth.plan import Recipe, Source


class Block(nn.Module):
    """A block of the large model whose weights exist while it runs."""

    def __init__(
        self, block: nn.Module, weights: Callable[[], dict[str, Tensor]], remakes: Callable[[], bool]
    ):
        super().__init__()
        self.block, self.weights, self.remakes = block, weights, remakes

    def forward(self, *inputs, **options):
        if not self.remakes():
            return self.run(*inputs, **options)
        return checkpoint(self.run, *inputs, use_reentrant=False, **options)

    def run(self, *inputs, **options):
        held = self.weights() | dict(self.block.named_buffers())
        return functional_call(self.block, held, inputs, options, strict=True)


class Expansion(nn.Module):
    """The large model; its only parameters are the operator's.

    remakes: does a step make the blocks again for the backward, in less memory?
    """

    def __init__(self, operator: Operator, source: Source, target: Model):
        super().__init__()
        self.operator, self.source, self.target = operator, source, target
        self.table = target.table()
        with init_empty_weights(include_buffers=False):
            large = target.auto.from_config(copy.deepcopy(target.config))
        large.tie_weights()
        large.config.use_cache = False
        names = (name for name, _ in large.named_parameters(remove_duplicate=False))  # of a tied one, each
        in_memory = {target.named(name): name for name in names}
        self.memory_name = {name: in_memory[name] for name in self.table}
        self.factored = set(self._factor(large))
        for layer in range(target.architecture.layers):
            self._wrap(large, layer)
        self.large = [large.train()]  # in a list: its weights are none of this module's parameters

    @property
    def remakes(self) -> bool:
        return not self.operator.keeps

    @remakes.setter
    def remakes(self, wanted: bool) -> None:
        self.operator.keeps = not wanted

    def _factor(self, large: nn.Module) -> Iterator[str]:
        """Makes embeddings and head work with the small model's tables; gives the names of these."""
        weights = {
            self.memory_name[name]: entry.weights[0]
            for name, (entry, layer) in self.table.items()
            if layer is None
        }
        head = large.get_output_embeddings()
        for path, module in large.named_modules():
            name = f"{path}.weight"
            if isinstance(module, nn.Embedding):
                yield name
                module.register_forward_hook(self._widen(weights[name]))
            elif module is head:
                tied = f"{_path(large, large.get_input_embeddings())}.weight"
                module.register_forward_pre_hook(self._narrow(weights.get(name) or weights[tied]))
                yield name

    def _widen(self, weight: Weight):
        def hook(module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor:
            B = self.operator.matrix(weight)
            with exactly(x):
                return x if B is None else x @ B.T

        return hook

    def _narrow(self, weight: Weight):
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            A = self.operator.matrix(weight)
            return inputs if A is None else (inputs[0] @ A,)

        return hook

    def _wrap(self, large: nn.Module, layer: int) -> None:
        """Puts a Block in the place of the large model's block."""
        entries = {self.memory_name[name]: entry for name, (entry, i) in self.table.items() if i == layer}
        path = f"{next(iter(entries)).split(f'.{layer}.')[0]}.{layer}"
        inside = {name.removeprefix(f"{path}."): entry for name, entry in entries.items()}
        block = large.get_submodule(path)
        block = Block(block, lambda: self._made(inside, layer), lambda: self.remakes)
        large.set_submodule(path, block)

    def _made(self, entries: dict[str, Entry], layer: int | None) -> dict[str, Tensor]:
        weights = [weight for entry in entries.values() for weight in entry.weights]
        made = map(self._rescaled, weights, self.operator.wide(weights, layer))
        return {name: entry.to_disk([next(made) for _ in entry.weights]) for name, entry in entries.items()}

    def _rescaled(self, weight: Weight, x: Tensor) -> Tensor:
        """Times what the small model multiplies it with and the large one does not."""
        factor = self.source.model.architecture.scale(weight.name) / weight.scale
        return x if factor == 1.0 else x * factor

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Of the large model, forward replaces the parameters; the buffers are used as they are.
        for module in self.large[0].modules():
            module._buffers.update({name: fn(x) for name, x in module._buffers.items() if x is not None})
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ):
        outside = {
            self.memory_name[name]: entry for name, (entry, layer) in self.table.items() if layer is None
        }
        weights = self._made({name: x for name, x in outside.items() if name not in self.factored}, None)
        for name in self.factored & outside.keys():
            entry = outside[name]
            weights[name] = entry.to_disk(self._rescaled(x, self.operator.small(x)) for x in entry.weights)
        batch = {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values}
        given = {name: x for name, x in batch.items() if x is not None}
        return functional_call(self.large[0], weights, kwargs=given)

    def recipe(self, name: str) -> Recipe:
        """How the tensor of that name on disk is made, once learning is over."""

        @torch.no_grad()
        def make(source: Source) -> Iterator[Tensor]:
            entry, layer = self.table[name]
            return iter([self._made({name: entry}, layer)[name]])

        return make


def _path(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)
