"""The engine of every run: `transformers.Trainer` under our schedules, on any number of processes."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import ExportableState

from growth.loading import load_model
from growth.training.division import Order
from growth.training.rates import with_rates
from growth.training.run import STATE
from growth.training.schedule import Schedule
from growth.training.sharded import (
    begin_with,
    blocks,
    copy_weights,
    is_sharded,
    load_moments,
    load_weights,
    tied,
)


class ScheduledTrainer(Trainer):
    """The Trainer with our schedule, a GPU a process, the same steps and losses on any number of processes,
    and a resume that reads the model whole.

    The Trainer's own looks for the names in memory, not strictly, so that what save_pretrained renames stays
    untrained: GPT-NeoX's head. It goes on from checkpoints in pieces (FSDP) with FSDP alone; ours from either
    kind with or without. With `args.fsdp` the model is sharded (FSDP2), on CPUs too, and computes what it
    computes whole, in float32 or under autocast.

    loss: such as summed_loss, None for the model's own. rates: of parameters that train at a
    share of the rate (training.rates); scaled: of those that do so and keep their decay. moments: that Adam
    begins with, by the names of parameters.
    """

    def __init__(
        self,
        rate: Schedule,
        *,
        model,
        args,
        data_collator,
        train_dataset,
        callbacks,
        loss: Callable | None = None,
        rates: Mapping[str, float] | None = None,
        scaled: Mapping[str, float] | None = None,
        moments: Mapping[str, Mapping[str, Tensor]] | None = None,
    ):
        self.rate, self.rates, self.scaled, self.moments = rate, rates, scaled, moments
        self._restored: str | None = None
        args._n_gpu = min(args.n_gpu, 1)  # it would give each GPU a batch of its own; torchrun does that
        super().__init__(
            model, args, data_collator, train_dataset, compute_loss_func=loss, callbacks=callbacks
        )
        # Its rule goes by the class's name, and GPT2LMHeadModel's does not tell.
        self._loss_shifts_labels |= type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.remove_callback(PrinterCallback)
        self.add_callback(Processes(args.world_size))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if not self.args.fsdp:
            return
        state = self.accelerator.state
        if not self.is_fsdp_enabled:  # accelerate leaves CPUs out
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        # Its own would put a Mamba's rates, and the sum of gradients, into 16 bits.
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        super().create_optimizer(model)
        network = self.model if model is None else model
        if self.rates and fresh:
            with_rates(self.optimizer, network, self.rates)
        if self.scaled and fresh:
            with_rates(self.optimizer, network, self.scaled, keep_decay=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.rate)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        args, examples = self.args, train_dataset or self.train_dataset
        each = args.train_batch_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        return Order(len(examples), args.max_steps * args.world_size * each, seed)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = blocks(self.model)
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.moments and resume_from_checkpoint is None:
            begin_with(self.moments, self.model, self.optimizer)
        if self.is_fsdp_enabled and self.accelerator.native_amp:
            model.forward = self.accelerator.autocast()(model.forward)
        return model, loader

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if is_sharded(resume_from_checkpoint):
            load_weights(Path(resume_from_checkpoint), self.model)
        else:
            copy_weights(load_model(resume_from_checkpoint).state_dict(), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(None)
        asked = self.lr_scheduler.base_lrs
        if self.is_fsdp_enabled or is_sharded(checkpoint):
            load_moments(Path(checkpoint), self.model, self.optimizer)
            saved = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            self.lr_scheduler.load_state_dict(saved)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        self._set_rates(asked)

    def _set_rates(self, peaks: Sequence[float]) -> None:
        """The peak of each group as it is asked for now, perhaps lower than it was (training.lowered)."""
        scheduler = self.lr_scheduler
        rates = [peak * shape(scheduler.last_epoch) for peak, shape in zip(peaks, scheduler.lr_lambdas)]
        scheduler.base_lrs, scheduler._last_lr = list(peaks), rates
        for group, peak, rate in zip(self.optimizer.param_groups, peaks, rates):
            group["initial_lr"], group["lr"] = peak, rate

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        state = self.accelerator.get_state_dict(self.model)  # whole, on the first process
        if self.args.should_save:
            self._save(output_dir, state_dict=tied(state, self.model))

    def restore(self, checkpoint: str) -> None:
        """What `train` leaves behind, from a checkpoint of the last step: `train` would add a step."""
        self._restored = checkpoint
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
        self._load_from_checkpoint(checkpoint)
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def keep_optimizer(self, folder: Path) -> None:
        """Optimizer, scheduler and state of the end, as the Trainer's checkpoints have them."""
        if self.optimizer is None:
            self.create_optimizer()
            self.create_scheduler(self.args.max_steps)
            self._load_optimizer_and_scheduler(self._restored)
        self._save_optimizer_and_scheduler(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / STATE))


class Processes(TrainerCallback, ExportableState):
    """Tells in trainer_state.json how many processes wrote a checkpoint."""

    def __init__(self, number: int):
        self.number = number

    def state(self) -> dict:
        return {"args": {}, "attributes": {"number": self.number}}


def summed_loss(outputs, labels, num_items_in_batch=None):
    """A batch's share of the mean loss over the labels of a step, which are `num_items_in_batch`.

    Masked models and classifiers give the mean over a batch: batches with fewer labels would count more.
    """
    logits = outputs["logits"].float().flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch
