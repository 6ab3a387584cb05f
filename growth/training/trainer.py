"""The verb `train`: a checkpoint and text, or images, in, a trained one out, by `transformers.Trainer`."""

import copy
import itertools
import json
import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from growth.card import write_card
from growth.checkpoint import Checkpoint
from growth.companions import BESIDE
from growth.errors import refuse, refuse_odd_seed
from growth.folders import refuse_existing
from growth.loading import load_model, quiet
from growth.record import RECORD
from growth.training.curve import Curve, Point
from growth.training.data import Collator, Data
from growth.training.flops import count_flops
from growth.training.freeze import UnfreezeOnPlateau, named_parameters, transferred
from growth.training.progress import RunProgress
from growth.training.run import KEPT, MODEL, SUFFIX, refuse_full, unfinished
from growth.training.schedule import cosine, lemon
from growth.training.scheduled import ScheduledTrainer
from growth.training.task import Task, task
from growth.writing import say_plainly

TRAINING = "training.json"  # how a checkpoint was trained


@dataclass(frozen=True)
class TrainReport:
    """The result of `train`. curve[0] is the model as it came, curve[-1] the model that was saved in `out`.

    step_flops: operations of one step with every weight trained. unfrozen_at: the number of steps after which
    the transferred weights trained too, None where they did from the start or never. settings: what was asked
    for.
    """

    out: Path
    curve: list[Point]
    parameters: int
    step_flops: int
    unfrozen_at: int | None
    settings: dict

    def json(self) -> dict:
        return asdict(self) | {"out": str(self.out)}

    def __str__(self) -> str:
        first, last = self.curve[0], self.curve[-1]
        return (
            f"{self.out}: {last.step} steps, validation loss {first.loss:.3f} -> {last.loss:.3f}, "
            f"{last.flops:.2e} FLOPs, {last.seconds:.1f} s"
        )


def train(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    steps: int,
    batch_size: int = 16,
    sequence_length: int | None = None,
    learning_rate: float = 3e-4,
    warmup: int | None = None,
    schedule: str = "cosine",
    decay: float = 0.6,
    freeze: str | None = None,
    unfreeze: str | None = None,
    window: int | None = None,
    threshold: float = 0.01,
    patience: int = 1,
    validation: Data | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    bf16: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> TrainReport:
    """Train the model `model`, a folder or the Hub's, for `steps` steps; save it in folder `out`.

    data, validation   files or folders of UTF-8 text, or Windows, for a language model; Images for an image
                       classifier. Without `validation`, a twentieth of the data's windows or images, at most
                       256, are held out and not trained on
    batch_size         windows or images a step, on each process
    sequence_length    tokens a window, at most the model's positions; default: these, at most 2048
    schedule           cosine | lemon, which falls over the share `decay` of the steps (training.schedule)
    warmup             steps in which the rate rises; default: a twentieth of them
    freeze             "transferred": what growth.json asks to hold still stays as it is; with unfreeze
                       "plateau", until the mean training loss of `window` steps (default: a thirtieth of
                       them) improves by less than `threshold` in `patience` windows (training.freeze)
    eval_every         steps between measurements of the validation loss; default: an eighth of the steps
    save_every         steps between the checkpoints a run resumes from, 0 for none; default: eval_every
    resume             go on from the newest whole checkpoint of an interrupted run, in `out`.unfinished, of
                       the same settings, data and model

    AdamW (0.9, 0.95), weight decay 0.1 on matrices, gradient norm clipped at 1, float32 weights; `bf16`
    computes in bfloat16. A masked model's batches are masked anew (training.data.collator), a resumed run's
    as if it had not stopped; what it is measured on is masked once, whatever the seed. Started by torchrun it
    trains on every process. The tokenizer is the model's. Seconds and FLOPs are those of training:
    evaluation, saving and loading are left out. Raises Refusal, with nothing written, where an argument does
    not fit. Where it stops after that, what is trained stays: beside `out`, or in `out`.unfinished, as a line
    says.
    """
    refuse_existing(out)
    out = Path(out)
    checkpoint = Checkpoint(model)
    config, record = checkpoint.config, checkpoint.record()
    if eval_every is None:
        eval_every = math.ceil(steps / 8)
    window = max(1, steps // 30) if window is None else window
    refuse_odd_seed(seed)
    for name, got, least in (
        ("steps", steps, 1),
        ("batch size", batch_size, 1),
        ("eval every", eval_every, 1),
        ("save every", save_every or 0, 0),
        ("window", window, 1),
        ("patience", patience, 1),
    ):
        if got < least:
            raise refuse(name, f"at least {least}", got, "choose a larger number")
    if not 0 < learning_rate < math.inf:
        raise refuse("learning rate", "above 0, and finite", learning_rate, "3e-4 is a common one")
    if schedule not in ("cosine", "lemon"):
        raise refuse("schedule", "cosine or lemon", schedule, "choose one of these")
    if (freeze, unfreeze) not in ((None, None), ("transferred", None), ("transferred", "plateau")):
        raise refuse(
            "freeze, unfreeze",
            "nothing, or transferred with or without plateau",
            f"{freeze}, {unfreeze}",
            "pass --freeze transferred --unfreeze plateau",
        )
    warmup = steps // 20 if warmup is None else warmup
    rate = cosine(steps, warmup=warmup) if schedule == "cosine" else lemon(steps, warmup=warmup, share=decay)
    save_every = eval_every if save_every is None else save_every
    frozen = transferred(checkpoint.path) if freeze else []
    work = task(checkpoint, data, validation, sequence_length)
    args = TrainingArguments(
        output_dir=str(out) + SUFFIX,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        seed=seed,
        data_seed=seed,
        learning_rate=learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=bf16,
        average_tokens_across_devices=not work.collate,  # BERT's mean would be times the processes
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or steps,
        save_total_limit=KEPT,
        ddp_find_unused_parameters=freeze is not None,
        logging_steps=window,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    taken = 0 if validation is not None else len(work.held_out)
    work.examples.refuse_unfit(batch_size, config, processes=args.world_size, held_out=taken)
    work.held_out.refuse_foreign(config, "data" if validation is None else "validation")
    settings = {
        "model": str(model),
        "data": work.examples.fingerprint(),
        "validation": work.held_out.fingerprint(),
        "processes": args.world_size,
        "steps": steps,
        "batch_size": batch_size,
        "sequence_length": work.examples.length,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "schedule": schedule,
        "decay": decay,
        "freeze": freeze,
        "frozen": f"{len(frozen)} tensors, {zlib.crc32(' '.join(frozen).encode()):08x}",
        "unfreeze": unfreeze,
        "window": window,
        "threshold": threshold,
        "patience": patience,
        "eval_every": eval_every,
        "save_every": save_every,
        "bf16": bf16,
        "seed": seed,
    }
    with (
        quiet(),
        unfinished(out, args, settings, checkpoint, resume) as last,
        RunProgress(str(out), steps, silent=args.process_index > 0) as progress,
    ):
        network = load_model(checkpoint.path)
        asked = copy.deepcopy(network.config)  # the Trainer turns its cache off, and leaves it off
        held = named_parameters(network, frozen)
        parameters = network.num_parameters()
        trained = parameters - (0 if unfreeze else sum(x.numel() for x in held))
        refuse_full(
            Path(args.output_dir), parameters, trained, math.ceil(steps / save_every) if save_every else 0
        )
        if args.process_index == 0:
            _write_companions(Path(args.output_dir) / MODEL, checkpoint.path, work, record)
        least = threshold if unfreeze else -math.inf  # no loss improves by less than that
        freezing = UnfreezeOnPlateau(frozen, least, patience, warmup) if freeze else None
        engine = ScheduledTrainer(
            rate,
            model=network,
            args=args,
            data_collator=_numbered(work.collate, args, last) if work.collate else None,
            train_dataset=work.examples,
            callbacks=[freezing] if freezing else None,
        )
        batch = {key: value.to(args.device) for key, value in work.first(batch_size).items()}
        step_flops = count_flops(network, batch)
        frozen_flops = count_flops(network, batch, frozen) if freezing else step_flops
        N = args.world_size
        curve = Curve(work.measure, eval_every, N * step_flops, N * frozen_flops, freezing, progress)
        engine.add_callback(curve)
        if last and last.endswith(f"-{steps}"):
            engine.restore(last)
        else:
            engine.train(resume_from_checkpoint=last)
        report = TrainReport(
            out,
            curve.points,
            parameters,
            step_flops,
            freezing.unfrozen_at if freezing else None,
            settings,
        )
        if not math.isfinite(curve.points[-1].loss):
            raise refuse(
                "learning rate", "one at which the loss stays finite", learning_rate, "choose a lower one"
            )
        network.config = asked
        _save(engine, report, checkpoint.path)
    return report


def _numbered(masked: Collator, args: TrainingArguments, last: str | None) -> Collator:
    """Masks each batch under a seed of its own: a run resumed from `last` goes on with the same masks.

    The Trainer's random numbers do not bring them back: it draws a batch ahead of the step that it saves.
    """
    steps = itertools.count(int(last.rpartition("-")[2]) if last else 0)

    def collate(windows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return masked(windows, zlib.crc32(f"{args.seed} {args.process_index} {next(steps)}".encode()))

    return collate


def _write_companions(folder: Path, source: Path, work: Task, record: dict) -> None:
    """What lies beside the weights; written before the first step, it cannot fail after the last."""
    folder.mkdir(exist_ok=True)
    if work.tokenizer:
        work.tokenizer.save_pretrained(folder)
    for file in (source / name for name in BESIDE):
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    if record:
        # How it came to be, without the promise of the source's logits: training breaks that.
        (folder / RECORD).write_text(json.dumps(record | {"lossless": False}, indent=1))


def _save(engine: Trainer, report: TrainReport, source: Path) -> None:
    folder = Path(engine.args.output_dir) / MODEL
    engine.save_model(str(folder))  # gathers sharded weights, so every process calls it
    if engine.is_world_process_zero():
        say_plainly(folder, engine.model.config)
        (folder / "training_args.bin").unlink()
        (folder / TRAINING).write_text(json.dumps(report.json(), indent=1))
        first, last = report.curve[0], report.curve[-1]
        each = "a token" if report.settings["sequence_length"] else "an image"
        facts = [
            f"trained by `growth train`, {last.step} steps, on {report.settings['data']}",
            f"validation loss {first.loss:.3f} -> {last.loss:.3f} nats {each}; all of it is in {TRAINING}",
        ]
        outlook, figures = "Its logits are its own, not the base model's.", "Not measured."
        write_card(folder, report.out.absolute().name, source, engine.model.config, facts, outlook, figures)
