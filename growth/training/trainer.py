"""The verb `train`: a checkpoint and text, or images, in, a trained one out, by `transformers.Trainer`."""

import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainingArguments

from growth.checkpoint import Checkpoint
from growth.errors import first_process, reason, refuse
from growth.folders import refuse_odd_output
from growth.loading import quiet
from growth.optimizing.shares import recorded_shares
from growth.record import named
from growth.training.corpus import kept_beside
from growth.training.data import Data
from growth.training.dropping import asked_of, refuse_pairs
from growth.training.freeze import Counts, transferred
from growth.training.masks import OpenMasks, closed_of, mask_steps, refuse_shared
from growth.training.moments import check_grown, moments_of
from growth.training.options import refuse_odd_options, refuse_unknown_reporters, typed
from growth.training.processes import together
from growth.training.progress import RunProgress
from growth.training.rates import copied
from growth.training.result import TrainReport
from growth.training.run import KEPT, SUFFIX, refuse_other_start, unfinished
from growth.training.schedule import constant, cosine, lemon
from growth.training.session import Session
from growth.training.sharded import shards
from growth.training.task import task
from growth.training.teacher import find_teacher
from growth.training.warming import WarmNewUnits

if TYPE_CHECKING:
    from growth.training.planned import TrainPlan


@together()
@typed
def train(
    model: str | Path,
    data: Data,
    out: str | Path | None = None,
    *,
    steps: int,
    batch_size: int = 16,
    gradient_accumulation: int = 1,
    sequence_length: int | None = None,
    pack: bool = False,
    text_field: str = "text",
    learning_rate: float = 3e-4,
    weight_decay: float = 0.1,
    warmup: int | None = None,
    schedule: str = "cosine",
    decay: float = 0.6,
    freeze: str | None = None,
    unfreeze: str | None = None,
    window: int | None = None,
    threshold: float = 0.01,
    patience: int = 1,
    patience_counts: Counts = "total",
    copied_rate: float | None = None,
    rates: Mapping[str, float] | None = None,
    masks: int | None = None,
    scaled_rates: bool = False,
    warm_new: int = 0,
    keep_optimizer: bool = False,
    teacher: str | Path | None = None,
    teacher_weight: float = 0.5,
    temperature: float = 1.0,
    validation: Data | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    bf16: bool = False,
    fp16: bool = False,
    gradient_checkpointing: bool = False,
    kernels: bool = True,
    fsdp: bool = False,
    report_to: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    seed: int = 0,
    resume: bool = False,
    dry_run: bool = False,
) -> "TrainReport | TrainPlan":
    """Train the model `model`, a folder or the Hub's, for `steps` steps; save it in folder `out`.

    data, validation   for a language model files or folders of UTF-8 text, JSON lines, Parquet or `datasets`
                       (training.texts), or Windows; Images for an image classifier. Without `validation` a
                       twentieth of the windows or images, at most 256, is held out and not trained on. Many
                       tokens are kept in `out`.tokens until the run ends, not in memory
    batch_size         windows or images at a time, on each process; a step takes `gradient_accumulation` of
                       these and is that of one large batch (the last of an epoch may have fewer)
    sequence_length    tokens a window, at most the model's positions; default: these, at most 2048
    pack               a window's documents do not see each other (training.data.Windows)
    text_field         of rows, the field or column that holds the text
    weight_decay       of matrices
    schedule           cosine | lemon, which falls over the share `decay` of the steps | constant, for a model
                       that is to grow or to be transferred (training.schedule; the rows "lemon-early" and
                       "hybrid-early" of benchmarks/REUSE.md)
    warmup             steps in which the rate rises; default: a twentieth of them, none with a state
    freeze             "transferred": what growth.json asks to hold still stays as it is; with unfreeze
                       "plateau", until the mean training loss of `window` steps (default: a thirtieth of
                       them) improves by less than `threshold` in `patience` windows, "total" or in a "row"
                       (training.freeze)
    copied_rate        the share of the rate for what growth.json says was copied; rates: shares by
                       patterns of names, which come first (training.rates)
    masks              steps in which the masks of method msg open, 0 for at once; default: a quarter of the
                       steps where growth.json has what is new, else there are none (training.masks)
    scaled_rates       what growing made c times as large learns at c times the rate (optimizing.shares)
    warm_new           steps in which the rate of new units rises, after growing (training.warming)
    keep_optimizer     `out` gets the optimizer's state of the last step, as the Trainer saves it, which
                       `growth grow --optimizer` takes; with a constant schedule always, but for `fsdp`
    teacher            a model, a folder or the Hub's, whose distribution at `temperature` has the share
                       `teacher_weight` of the loss (training.distil)
    eval_every         steps between measurements of the validation loss; default: an eighth of the steps
    save_every         steps between the checkpoints a run resumes from, 0 for none; default: eval_every
    gradient_checkpointing   layers are computed again in the backward, not kept
    kernels            Mamba layers of transformers' models compute on lcikernels, as long as the run lasts
                       (lcikernels.compat.transformers.patch)
    fsdp               several processes share the weights and moments out among them (FSDP2); so does
                       `accelerate launch --use_fsdp`
    report_to          who is told losses and rates, as the Trainer names them: "tensorboard", whose files are
                       in `out`/runs, "wandb", ...
    callbacks          of the Trainer, such as those of training.callbacks; what these leave out of a step is
                       not among the FLOPs. A resumed run is given them anew, with the same settings
    resume             go on from the newest whole checkpoint of an interrupted run, in `out`.unfinished, of
                       the same settings, data and model, from step 0 where it was killed before it had one;
                       where there is no such run, begin with the optimizer's state beside `model`, at step 0
                       of a new schedule
    dry_run            write nothing, and return what would be done (training.planned); `out` may be left out

    AdamW (0.9, 0.95), gradient norm clipped at 1, float32 weights; `bf16` and `fp16` compute in 16 bits. A
    masked model's batches are masked anew (training.data.collator), a resumed run's as if it had not stopped;
    what it is measured on is masked once, whatever the seed. Started by torchrun it trains on every process.
    The tokenizer is the model's. Seconds and FLOPs, the teacher's among them, are those of training:
    evaluation, saving and loading are left out. Raises Refusal, with nothing written, where an argument does
    not fit. Where it stops after that, what is trained stays: beside `out`, or in `out`.unfinished, as a line
    says. A loss that is not finite stops it before it is learned from (training.finite).
    """
    refuse_odd_output(out, dry_run and out is None)
    out = Path(f"growth-{token_hex(8)}" if out is None else out)  # where nothing lies, for a dry run
    checkpoint = Checkpoint(model)
    closed = closed_of(checkpoint.record())
    eval_every = math.ceil(steps / 8) if eval_every is None else eval_every
    run = Path(str(out) + SUFFIX)
    moments = moments_of(run, checkpoint, resume)
    if first_process():  # a late one could see what the first has made
        refuse_other_start(run, resume, moments)
    asked = {
        "steps": steps,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "pack": pack,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": (0 if moments else steps // 20) if warmup is None else warmup,
        "schedule": schedule,
        "decay": decay,
        "freeze": freeze,
        "unfreeze": unfreeze,
        "window": max(1, steps // 30) if window is None else window,
        "threshold": threshold,
        "patience": patience,
        "patience_counts": patience_counts,
        "copied_rate": copied_rate,
        "rates": dict(rates or {}),
        "masks": mask_steps(closed, masks, steps),
        "scaled_rates": scaled_rates,
        "warm_new": warm_new,
        "keep_optimizer": keep_optimizer,
        "teacher": None if teacher is None else str(teacher),
        "teacher_weight": teacher_weight,
        "temperature": temperature,
        "eval_every": eval_every,
        "save_every": eval_every if save_every is None else save_every,
        "bf16": bf16,
        "fp16": fp16,
        "gradient_checkpointing": gradient_checkpointing,
        "kernels": kernels,
        "callbacks": [asked_of(callback) for callback in chosen_callbacks(callbacks)],
        "seed": seed,
    }
    refuse_odd_options(asked)
    refuse_unknown_reporters(report_to)
    warmup = asked["warmup"]
    if schedule == "lemon":
        rate = lemon(steps, warmup=warmup, share=decay)
    else:
        rate = (cosine if schedule == "cosine" else constant)(steps, warmup=warmup)
    frozen = transferred(checkpoint.path) if freeze else []
    slow = [] if copied_rate is None else copied(checkpoint.path)
    scaled = recorded_shares(checkpoint.path) if scaled_rates else {}
    args = _arguments(str(run), asked, fsdp, report_to)
    masking = OpenMasks({"closed": closed}, asked["masks"]) if asked["masks"] else None
    if masking and args.fsdp:
        raise refuse_shared()
    refuse_pairs(callbacks, [OpenMasks] * bool(masking) + [WarmNewUnits] * bool(warm_new))
    check_grown(checkpoint, asked, moments, resume, args)
    asked["keep_optimizer"] |= schedule == "constant" and not args.fsdp
    with nullcontext() if dry_run else kept_beside(out, Path(args.output_dir)) as cache:
        how = {"field": text_field, "pack": pack, "cache": cache}
        work = task(checkpoint, data, validation, sequence_length, **how)
        processes, given = args.world_size, validation is not None
        work.examples.refuse_unfit(
            batch_size * gradient_accumulation,
            checkpoint.config,
            processes=processes,
            held_out=0 if given else len(work.held_out),
        )
        work.held_out.refuse_foreign(checkpoint.config, "validation" if given else "data")
        master = None if teacher is None else find_teacher(teacher, checkpoint, work.examples.length)
        settings = asked | {
            "model": str(model),
            "data": work.examples.fingerprint(),
            "validation": work.held_out.fingerprint(),
            "processes": processes,
            "moments": moments,
            "sequence_length": work.examples.length,
            "frozen": _told(frozen),
            "copied": _told(slow),
            "teacher": master and master.fingerprint(),
            "teacher_name": master and master.name,
            "data_name": named(data),
            "validation_name": named(validation) if given else "",
            "text_field": text_field,
        }
        shares = dict(rates or {}) | dict.fromkeys(slow, copied_rate)
        how = rate, frozen, shares, scaled, master, callbacks, masking
        session = Session(out, checkpoint, work, args, settings, *how)
        if dry_run:
            from growth.training.planned import plan_of  # its costs take seconds to import

            with quiet():
                return plan_of(session, resume)
        with (
            quiet(),
            unfinished(out, args, settings, checkpoint, resume) as last,
            RunProgress(str(out), steps, silent=args.process_index > 0) as progress,
        ):
            return session.trained(last, progress)


def chosen_callbacks(given: Sequence[TrainerCallback]) -> Sequence[TrainerCallback]:
    """Those given. Raises Refusal where they are no list of callbacks."""
    if not isinstance(given, list | tuple) or not all(isinstance(x, TrainerCallback) for x in given):
        raise refuse("callbacks", "a list of a Trainer's", repr(given), "such as [LayerDropping(0.1)]")
    return given


def _told(names: list[str]) -> str:
    return f"{len(names)} tensors, {zlib.crc32(' '.join(names).encode()):08x}"


def _arguments(folder: str, asked: dict, fsdp: bool, report_to: Sequence[str]) -> TrainingArguments:
    try:
        with quiet():
            return TrainingArguments(
                output_dir=folder,
                max_steps=asked["steps"],
                per_device_train_batch_size=asked["batch_size"],
                gradient_accumulation_steps=asked["gradient_accumulation"],
                activation_checkpointing=asked["gradient_checkpointing"],
                activation_checkpointing_kwargs={"use_reentrant": False},
                seed=asked["seed"],
                data_seed=asked["seed"],
                learning_rate=asked["learning_rate"],
                adam_beta1=0.9,
                adam_beta2=0.95,
                weight_decay=asked["weight_decay"],
                max_grad_norm=1.0,
                bf16=asked["bf16"],
                fp16=asked["fp16"],
                fsdp=shards(fsdp),
                fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"},
                dataloader_drop_last=True,
                dataloader_pin_memory=torch.accelerator.is_available(),
                use_cpu=not torch.accelerator.is_available(),
                save_strategy="steps" if asked["save_every"] else "no",
                save_steps=asked["save_every"] or asked["steps"],
                save_total_limit=KEPT,
                ddp_find_unused_parameters=asked["freeze"] is not None or bool(asked["callbacks"]),
                logging_steps=asked["window"],
                logging_nan_inf_filter=False,  # StopOnNaN looks first
                disable_tqdm=True,
                report_to=list(report_to) or "none",
                log_level="error",
                log_level_replica="error",
            )
    except ValueError as error:  # what this machine cannot do, such as bfloat16
        raise refuse("train", "options that run here", reason(error), "leave them out") from error
