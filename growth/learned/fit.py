"""Training what an operator learns."""

import math
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from growth.errors import refuse
from growth.learned.expansion import Expansion
from growth.learned.memory import fits
from growth.loading import load_tokenizer, quiet
from growth.plan import Source
from growth.training.data import Data, collator, examples_of, window_length
from growth.training.examples import Examples
from growth.training.flops import count_flops
from growth.training.progress import RunProgress, ShowSteps
from growth.training.schedule import cosine
from growth.training.scheduled import ScheduledTrainer
from growth.training.task import refuse_other_kind

if TYPE_CHECKING:
    from growth.growing import Growth

LENGTH = 512  # tokens of a window, unless asked otherwise


class Learned:
    """The large model of a method that learns, and what it learns from."""

    def __init__(self, growth: "Growth"):
        self.growth, method, source = growth, growth.method, growth.source
        self.examples = examples_for(
            source,
            method.data,
            method.batch_size,
            method.sequence_length,
            method.name,
            windows=method.steps * method.batch_size,
            seed=growth.seed,
        )
        old, new = source.model.architecture, growth.target.architecture
        operator = method.operator(source, old, new, growth.maps, growth.seed)
        self.expansion = Expansion(operator, source, growth.target)
        self.recipe = self.expansion.recipe

    def fit(self) -> tuple[int, dict[str, Any]]:
        """The operations that took, and what growth.json tells of it."""
        method, examples = self.growth.method, self.examples
        how = {name: getattr(method, name) for name in ("steps", "batch_size", "learning_rate", "remake")}
        flops, losses = fit(self.expansion, examples, name=method.name, seed=self.growth.seed, **how)
        told = {"data": examples.fingerprint(), "sequence_length": examples.length, "training_losses": losses}
        return flops, told


def examples_for(
    source: Source,
    data: Data | None,
    batch_size: int,
    sequence_length: int | None,
    method: str,
    field: str = "text",
    *,
    windows: int,
    seed: int,
) -> Examples:
    """Data as examples: text, of rows their `field`, in windows of `sequence_length` tokens; by default
    LENGTH, or as many as the model has positions. Of much text so many `windows`, or a batch, that `seed`
    draws.

    Raises Refusal where there are none, where they do not fit the model, or fill no batch.
    """
    config = source.config
    if data is None:
        sees = source.family.probe == "images"
        remedy = "pass a file or a folder of text"
        if sees:
            remedy = "call it from Python, with growth.training.images.Images"
        raise refuse("data", f"{'Images' if sees else 'text'} that {method} learns from", "none", remedy)
    refuse_other_kind(source.model, data)
    length = window_length(config, data, None, sequence_length, usual=LENGTH)
    if not isinstance(data, Examples):
        tokenizer, windows = load_tokenizer(source.checkpoint.path), max(windows, batch_size)
        data = examples_of(data, tokenizer, length, field=field, windows=windows, seed=seed)
    data.refuse_unfit(batch_size, config)
    return data


def fit(
    expansion: Expansion,
    examples: Examples,
    *,
    name: str,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    remake: str = "auto",
) -> tuple[int, list[float]]:
    """Train what the operator learns for `steps` steps of AdamW: the operations that took, and the losses of
    the first step and of every tenth of all.

    Warm-up over the first tenth (LiGO's published recipe warms up for 10000 steps and stops after 100), then
    a cosine to 0; no weight decay; gradients clipped at 1; bfloat16 on a GPU that has it. remake: are blocks
    made again for the backward, auto | always | never; by itself where memory would not hold them. Afterwards
    the operator is on the CPU. Raises Refusal where the loss did not stay finite.
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
            logging_first_step=True,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            log_level="error",
        )
        trainer = ScheduledTrainer(
            cosine(steps, warmup=steps // 10, floor=0.0),
            model=expansion,
            args=arguments,
            train_dataset=examples,
            data_collator=collator(expansion.target.auto, folder),
            callbacks=[ShowSteps(progress)],
        )
        where = examples, batch_size, arguments.device
        expansion.remakes = remake == "always" or remake == "auto" and not fits(expansion, *where)
        flops = step_flops(expansion, *where) * steps
        mean = trainer.train().training_loss
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    if not math.isfinite(mean):
        raise refuse(
            "learning-rate", "one at which the loss stays finite", learning_rate, "choose a lower one"
        )
    expansion.operator.forget()
    expansion.cpu().requires_grad_(False)
    return flops, losses


def step_flops(expansion: Expansion, examples: Examples, batch_size: int, device: torch.device) -> int:
    """Operations of one step, from those of one example and of two: counting keeps what checkpoints free."""
    one, two = (
        count_flops(expansion, {name: x.to(device) for name, x in examples.batch([0] * B).items()})
        for B in (1, 2)
    )
    return one + (batch_size - 1) * (two - one)
