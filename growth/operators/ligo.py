"""LiGO: learn how to grow.  Wang et al., ICLR 2023 (arXiv 2303.00980).

    new[i] = B (sum_j w[i, j] W[j]) A^T          B = write, A = read, w = depth, mixed first

Each space has its own B, the residual stream one for the whole model, queries, keys, values and neurons one
per target layer; each weight has its own depth coefficients. The maps are trained for a few steps on the
large model's own loss, the source's weights stay as they are.

    published   A = B of the producer; B = [I; C], rows of C random with sum 1; depth: stacking plus noise,
                rows with sum 1. Preserves nothing: with A = B, readers see each channel more than once.
    lossless    A and B apart, starting from LEMON's maps, so that step 0 is the source; then they go where
                the loss leads. Readers get a random part that B never writes, or copies would stay equal.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from growth.adapters.table import Adapter
from growth.depth import rearranged, stacked
from growth.engine import expand, named_seed, reader
from growth.loading import load_tokenizer, quiet
from growth.maps import Map, Maps, Widen, keep, per_layer
from growth.operators.lemon import lemon
from growth.plan import Source
from growth.spaces import Architecture, Weight
from growth.training.data import Windows, refuse_foreign, windows_of
from growth.training.flops import count_flops
from growth.training.progress import RunProgress, ShowSteps
from lcikernels import kronecker_expand

STARTS = ("lossless", "published")
SHARED = ("residual", "gain", "normed", "final_gain", "final")  # B_emb in the published ties
DEPTH_NOISE = 0.03
UNSEEN = 0.1  # the random part of a reader, relative to the weight that it is drawn from


def ligo(old: Architecture, new: Architecture, *, start: str = "lossless", seed: int = 0) -> Maps:
    """The maps that learning starts from; see `learned`."""
    generator = torch.Generator().manual_seed(named_seed(seed, "ligo"))
    return _lossless(old, new, generator) if start == "lossless" else _published(old, new, generator)


def _lossless(old: Architecture, new: Architecture, generator: torch.Generator) -> Maps:
    maps = lemon(old, new, noise=0.0)
    spaces: dict[str, Map] = {}
    for name, space in maps.spaces.items():
        if name == "vocab":  # it does not grow, and as a matrix it would fill 20 GB at 50k tokens
            spaces[name] = space
            continue
        dense = space.dense()
        T, S = dense.read_matrix.shape
        fresh = torch.randn(S, T, dtype=torch.float64, generator=generator) * UNSEEN / math.sqrt(S)
        spaces[name] = replace(dense, read_matrix=dense.read_matrix + space.unseen(fresh).T)
    return replace(maps, spaces=spaces)


def _published(old: Architecture, new: Architecture, generator: torch.Generator) -> Maps:
    def tied(S: int, T: int) -> Widen:
        added = torch.rand(T - S, S, dtype=torch.float64, generator=generator)
        B = torch.cat([torch.eye(S, dtype=torch.float64), added / added.sum(1, keepdim=True)])
        return Widen(B, B)

    stream = tied(old.spaces["residual"].size, new.spaces["residual"].size)
    spaces: dict[str, Map] = {"vocab": keep(old.spaces["vocab"])} | dict.fromkeys(SHARED, stream)
    spaces |= per_layer(old, new, lambda a, b: tied(a.size, b.size))
    depth = {}
    for weight in filter(lambda weight: weight.layered, old.weights):
        rows = rearranged(stacked(old.layers, new.layers), old.layers)
        rows += torch.rand(rows.shape, dtype=torch.float64, generator=generator) * DEPTH_NOISE
        depth[weight.name] = rows / rows.sum(1, keepdim=True)
    return Maps(spaces, depth)


class Expansion(nn.Module):
    """The large model as a function of B, A and w: its parameters; the weights are made in every forward."""

    def __init__(self, maps: Maps, source: Source, adapter: Adapter, config: PreTrainedConfig):
        super().__init__()
        self.maps_ = maps
        read = reader(source)
        self.old = {key: read(*key) for key in source.place}
        matrices = {name for (name, layer), x in self.old.items() if layer is not None and x.ndim == 2}
        layers = range(adapter.describe(source.config, adapter).layers)
        self.stacks = {name: torch.stack([self.old.pop((name, j)) for j in layers]) for name in matrices}
        self.table = adapter.table(config)
        in_memory = {disk: name for name, disk in adapter.renamed.items()}
        self.memory_name = {name: in_memory.get(name, name) for name in self.table}
        self.heads = config.num_attention_heads
        with init_empty_weights(include_buffers=False):
            large = AutoModelForCausalLM.from_config(config)
        large.tie_weights()
        self.large = [large.train()]  # in a list: its weights are none of this module's parameters
        tensors = {id(x): x for x in self._tensors(maps)}
        self.index = {key: i for i, key in enumerate(tensors)}
        self.tensors = nn.ParameterList(nn.Parameter(x.float()) for x in tensors.values())

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.old = {key: fn(x) for key, x in self.old.items()}
        self.stacks = {name: fn(x) for name, x in self.stacks.items()}
        # Of the large model, forward replaces the parameters; the buffers are used as they are.
        for module in self.large[0].modules():
            module._buffers.update({name: fn(x) for name, x in module._buffers.items() if x is not None})
        return self

    def _tensors(self, maps: Maps) -> Iterator[Tensor]:
        for space in maps.spaces.values():
            if isinstance(space, Widen):
                yield from (space.write_matrix, space.read_matrix)
        yield from maps.depth.values()

    def maps(self) -> Maps:
        """The maps as they are now, differentiable; tensors that were tied are tied."""

        def now(x: Tensor) -> Tensor:
            return self.tensors[self.index[id(x)]]

        spaces = {
            name: Widen(now(space.write_matrix), now(space.read_matrix))
            if isinstance(space, Widen)
            else space
            for name, space in self.maps_.spaces.items()
        }
        return replace(
            self.maps_, spaces=spaces, depth={name: now(x) for name, x in self.maps_.depth.items()}
        )

    def weights(self) -> dict[str, Tensor]:
        """The large model's weights as they are now, by their names in memory."""
        maps = self.maps()
        return {
            self.memory_name[name]: entry.to_disk(
                [self.expanded(weight, layer, maps) for weight in entry.weights], self.heads
            )
            for name, (entry, layer) in self.table.items()
        }

    def expanded(self, weight: Weight, layer: int | None, maps: Maps) -> Tensor:
        """One wide weight of one target layer; of a matrix nothing but the maps is kept for the backward."""
        sides = [maps.spaces[space.format(layer)] for space in weight.spaces]
        if weight.name not in self.stacks or not all(isinstance(side, Widen) for side in sides):
            return expand(weight, layer, self.old_weight, maps)
        stack = self.stacks[weight.name]
        depth = maps.depth[weight.name][layer : layer + 1]
        dense = (sides[0].write_matrix, sides[1].read_matrix, depth)
        return kronecker_expand(stack, *(x.to(stack.dtype) for x in dense))[0]

    def old_weight(self, name: str, layer: int | None) -> Tensor:
        return self.stacks[name][layer] if name in self.stacks else self.old[name, layer]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None):
        return functional_call(
            self.large[0], self.weights(), kwargs={"input_ids": input_ids, "labels": labels}
        )


def learned(
    maps: Maps,
    source: Source,
    adapter: Adapter,
    config: PreTrainedConfig,
    *,
    data: str | Path | Windows,
    steps: int,
    seed: int,
    batch_size: int = 16,
    sequence_length: int = 512,
    learning_rate: float = 2e-3,
) -> tuple[Maps, int]:
    """The maps after `steps` steps of AdamW on the large model's loss, and the operations that took.

    Warm-up over the first tenth (the published recipe warms up for 10000 steps and stops after 100), then a
    cosine; gradients clipped at 1.
    """
    if not isinstance(data, Windows):
        length = min(sequence_length, config.max_position_embeddings)
        data = windows_of(data, load_tokenizer(source.checkpoint.path), length)
    refuse_foreign(data.windows, config.vocab_size)
    module = Expansion(maps, source, adapter, config)
    flops = count_flops(module, data.batch(range(min(batch_size, len(data))))) * steps
    with quiet(), tempfile.TemporaryDirectory() as scratch, RunProgress("ligo", steps) as progress:
        arguments = TrainingArguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            seed=seed,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # as growth.train does, and for the same reason
        trainer = Trainer(model=module, args=arguments, train_dataset=data, callbacks=[ShowSteps(progress)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return module.cpu().requires_grad_(False).maps(), flops
