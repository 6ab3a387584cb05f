"""Learned growth: the large model as a function of a few parameters, trained on its own loss.

Every block of the large model makes its weights when it runs, inside a checkpoint: they are freed behind it
and made again in the backward, so that the wide weights of one block are in memory at a time. Wide embeddings
and heads are never made at all: a row of the small table is widened after it is looked up, and what the head
reads is narrowed first,

    embed(ids) = small(ids) · Bᵀ            logits = (x · A) · smallᵀ
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, TrainingArguments

from growth.adapters.table import Adapter, Entry
from growth.engine import reader
from growth.errors import refuse
from growth.loading import load_tokenizer, quiet
from growth.plan import Source
from growth.spaces import Weight
from growth.training.data import Data, Windows, collator, window_length, windows_of
from growth.training.flops import count_flops
from growth.training.progress import RunProgress, ShowSteps
from growth.training.schedule import cosine
from growth.training.trainer import ScheduledTrainer

LENGTH = 512  # tokens of a window, unless asked otherwise


class Operator(nn.Module):
    """What learns: it holds the small model's weights, in float32, and makes large ones of them."""

    def __init__(self, source: Source):
        super().__init__()
        read, layers = reader(source), range(source.config.num_hidden_layers)
        for weight in source.adapter.weights(source.config):
            name = weight.name
            x = torch.stack([read(name, j) for j in layers]) if weight.layered else read(name, None)
            self.register_buffer(key(name), x.float(), persistent=False)
        self.rounded: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def held(self, name: str) -> Tensor:
        """A buffer in the dtype that products run in: under autocast a copy in 16 bits, made once."""
        x = getattr(self, key(name))
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return x
        copy_of = name, x.device, torch.get_autocast_dtype(kind)
        if copy_of not in self.rounded:
            self.rounded[copy_of] = x.to(copy_of[-1])
        return self.rounded[copy_of]

    def small(self, weight: Weight) -> Tensor:
        """A weight of the small model; those of all layers, [L, ...], where it is layered."""
        return getattr(self, key(weight.name))

    def wide(self, weights: Sequence[Weight], layer: int | None) -> list[Tensor]:
        """Weights of one layer of the large model, or of none, as they are now; differentiable."""
        raise NotImplementedError

    def matrix(self, weight: Weight, axis: int) -> Tensor | None:
        """The map [T, S] of an axis of a weight outside the layers; None where the axis does not grow."""
        raise NotImplementedError


def exactly(x: Tensor) -> torch.autocast:
    """No 16 bits: for what makes vectors and the stream of embeddings, which models have in float32."""
    return torch.autocast(x.device.type, enabled=False)


def key(name: str) -> str:
    """A name for parameters and buffers, which may have no dots."""
    return name.replace(".", "/")


class Block(nn.Module):
    """A block of the large model whose weights exist while it runs."""

    def __init__(self, block: nn.Module, weights: Callable[[], dict[str, Tensor]]):
        super().__init__()
        self.block, self.weights = block, weights

    def forward(self, *inputs, **options):
        return checkpoint(self.run, *inputs, use_reentrant=False, **options)

    def run(self, *inputs, **options):
        return functional_call(self.block, self.weights(), inputs, options, strict=True)


class Expansion(nn.Module):
    """The large model; its only parameters are the operator's."""

    def __init__(self, operator: Operator, source: Source, adapter: Adapter, config: PreTrainedConfig):
        super().__init__()
        self.operator, self.source, self.adapter = operator, source, adapter
        self.table = adapter.table(config)
        self.heads = config.num_attention_heads
        in_memory = {disk: name for name, disk in adapter.renamed.items()}
        self.memory_name = {name: in_memory.get(name, name) for name in self.table}
        with init_empty_weights(include_buffers=False):
            large = adapter.auto.from_config(copy.deepcopy(config))
        large.tie_weights()
        large.config.use_cache = False
        self.factored = set(self._factor(large))
        for layer in range(config.num_hidden_layers):
            self._checkpoint(large, layer)
        self.large = [large.train()]  # in a list: its weights are none of this module's parameters

    def _factor(self, large: nn.Module) -> Iterator[str]:
        """Makes embeddings and head work with the small model's tables; gives the names of these."""
        weights = {
            self.memory_name[name]: entry.weights[0]
            for name, (entry, layer) in self.table.items()
            if layer is None
        }
        head = large.get_output_embeddings()
        tied = f"{_path(large, large.get_input_embeddings())}.weight"
        for path, module in large.named_modules():
            name = f"{path}.weight"
            if isinstance(module, nn.Embedding):
                yield name
                module.register_forward_hook(self._widen(weights[name]))
            elif module is head:
                module.register_forward_pre_hook(self._narrow(weights.get(name) or weights[tied]))
                yield name

    def _widen(self, weight: Weight):
        def hook(module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor:
            B = self.operator.matrix(weight, 0)
            with exactly(x):
                return x if B is None else x @ B.T

        return hook

    def _narrow(self, weight: Weight):
        axis = 1 - weight.spaces.index("vocab")

        def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            A = self.operator.matrix(weight, axis)
            return inputs if A is None else (inputs[0] @ A,)

        return hook

    def _checkpoint(self, large: nn.Module, layer: int) -> None:
        """Puts a Block in the place of the large model's block."""
        entries = {self.memory_name[name]: entry for name, (entry, i) in self.table.items() if i == layer}
        path = f"{next(iter(entries)).split(f'.{layer}.')[0]}.{layer}"
        inside = {name.removeprefix(f"{path}."): entry for name, entry in entries.items()}
        large.set_submodule(path, Block(large.get_submodule(path), lambda: self._made(inside, layer)))

    def _made(self, entries: dict[str, Entry], layer: int | None) -> dict[str, Tensor]:
        weights = [weight for entry in entries.values() for weight in entry.weights]
        made = iter(self.operator.wide(weights, layer))
        return {
            name: entry.to_disk([next(made) for _ in entry.weights], self.heads)
            for name, entry in entries.items()
        }

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Of the large model, forward replaces the parameters; the buffers are used as they are.
        for module in self.large[0].modules():
            module._buffers.update({name: fn(x) for name, x in module._buffers.items() if x is not None})
        return self

    def forward(self, input_ids: Tensor, labels: Tensor | None = None):
        outside = {
            self.memory_name[name]: entry for name, (entry, layer) in self.table.items() if layer is None
        }
        weights = self._made({name: x for name, x in outside.items() if name not in self.factored}, None)
        for name in self.factored & outside.keys():
            entry = outside[name]
            weights[name] = entry.to_disk(map(self.operator.small, entry.weights), self.heads)
        batch = {"input_ids": input_ids, "labels": labels}
        return functional_call(self.large[0], weights, kwargs=batch)

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the large model in its layout on disk, not rounded yet."""
        for name, (entry, layer) in self.table.items():
            yield name, self._made({name: entry}, layer)[name]


def _path(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def windows_for(source: Source, data: Data, batch_size: int, sequence_length: int | None) -> Windows:
    """Data as windows of `sequence_length` tokens; by default LENGTH, or as many as the model has positions.

    Raises Refusal where they do not fit the model, or fill no batch.
    """
    config = source.config
    length = window_length(config, data, None, sequence_length, usual=LENGTH)
    if not isinstance(data, Windows):
        data = windows_of(data, load_tokenizer(source.checkpoint.path), length)
    data.refuse_unfit(batch_size, config.vocab_size)
    return data


def fit(
    expansion: Expansion,
    windows: Windows,
    *,
    name: str,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[int, float]:
    """Train what the operator learns for `steps` steps of AdamW: the operations that took, and the mean loss.

    Warm-up over the first tenth (LiGO's published recipe warms up for 10000 steps and stops after 100), then
    a cosine to 0; no weight decay; gradients clipped at 1; bfloat16 on a GPU that has it. Afterwards the
    operator is on the CPU. Raises Refusal where the loss did not stay finite.
    """
    folder = expansion.source.checkpoint.path
    with quiet(), tempfile.TemporaryDirectory() as scratch, RunProgress(name, steps) as progress:
        arguments = TrainingArguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=math.ceil(steps / 10),
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            log_level="error",
        )
        trainer = ScheduledTrainer(
            cosine(steps, warmup=steps // 10, floor=0.0),
            model=expansion,
            args=arguments,
            train_dataset=windows,
            data_collator=collator(expansion.adapter, folder),
            callbacks=[ShowSteps(progress)],
        )
        flops = step_flops(expansion, windows, batch_size, arguments.device) * steps
        loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise refuse(
            "learning-rate", "one at which the loss stays finite", learning_rate, "choose a lower one"
        )
    expansion.operator.rounded.clear()
    expansion.cpu().requires_grad_(False)
    return flops, loss


def step_flops(expansion: Expansion, windows: Windows, batch_size: int, device: torch.device) -> int:
    """Operations of one step, from those of one window and of two: counting keeps what checkpoints free."""
    one, two = (
        count_flops(expansion, {name: x.to(device) for name, x in windows.batch([0] * B).items()})
        for B in (1, 2)
    )
    return one + (batch_size - 1) * (two - one)
