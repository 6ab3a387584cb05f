"""A Trainer of transformers' own, on a few windows, for callbacks that are to work in anyone's."""

from functools import partial

import torch
from checkpoints import ALL
from transformers import Trainer, TrainingArguments

WINDOWS = [{"input_ids": x, "labels": x} for x in torch.randint(256, (32, 8), generator=torch.Generator())]
llama = partial(ALL["llama"], vocab_size=256, num_hidden_layers=4)


def arguments(out="unused", **fields):
    return TrainingArguments(
        output_dir=str(out),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
        | {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        | fields,
    )


def trainer(model, out, *callbacks, data=WINDOWS, **fields):
    args = arguments(out, **fields)
    return Trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))


def without_dropout(model):
    """In train mode, computing what evaluation does."""
    for module in model.train().modules():
        for field in ("p", "dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    model.config.use_cache = False  # as the Trainer sets it
    return model
