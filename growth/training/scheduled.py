"""The engine of every run: `transformers.Trainer` under our schedules."""

import os
from collections.abc import Callable, Mapping

from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerState
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from growth.loading import load_model
from growth.training.rates import with_rates
from growth.training.run import STATE
from growth.training.schedule import Schedule


class ScheduledTrainer(Trainer):
    """The Trainer with our schedule, a GPU a process, and a resume that reads the model whole.

    The Trainer's own looks for the names in memory, not strictly, so that what save_pretrained renames stays
    untrained: GPT-NeoX's head. Sharded models (FSDP) have their own format and keep their own way.

    loss: the Trainer's compute_loss_func, None for the model's own. rates: of parameters that train at a
    share of the rate (training.rates).
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
    ):
        self.rate, self.rates = rate, rates
        args._n_gpu = min(args.n_gpu, 1)  # it would give each GPU a batch of its own; torchrun does that
        super().__init__(
            model, args, data_collator, train_dataset, compute_loss_func=loss, callbacks=callbacks
        )
        # Its rule goes by the class's name, and GPT2LMHeadModel's does not tell.
        self._loss_shifts_labels |= type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        super().create_optimizer(model)
        if self.rates and fresh:
            with_rates(self.optimizer, self.model if model is None else model, self.rates)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.rate)
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_state_dict(load_model(resume_from_checkpoint).state_dict())

    def restore(self, checkpoint: str) -> None:
        """What `train` leaves behind, from a checkpoint of the last step: `train` would add a step."""
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
        self._load_from_checkpoint(checkpoint)
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)
