"""growth train."""

import json
from typing import Annotated, Any

import typer

import growth
from growth.cli.arguments import Json, Seed, TextField
from growth.cli.printing import say


def train(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of the checkpoint.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A file, or a folder of them: text, JSON lines, Parquet, or what `datasets` saved.",
            show_default=False,
        ),
    ],
    steps: Annotated[int, typer.Option(help="Steps of training.", show_default=False)],
    folder: Annotated[
        str | None,
        typer.Option("--out", help="New folder for the result; may be left out of a dry run."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time, on each process.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a window; default: the model's.")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Keep a window's documents apart.")] = False,
    text_field: TextField = "text",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.1,
    warmup: Annotated[int | None, typer.Option(help="Steps of warm-up; default: a twentieth.")] = None,
    schedule: Annotated[
        str, typer.Option(help="cosine | lemon (same peak, faster fall) | constant")
    ] = "cosine",
    decay: Annotated[float, typer.Option(help="lemon: share of the steps in which the rate falls.")] = 0.6,
    freeze: Annotated[str | None, typer.Option(help="transferred: hold what was copied still.")] = None,
    unfreeze: Annotated[str | None, typer.Option(help="plateau: until the loss stops improving.")] = None,
    window: Annotated[
        int | None, typer.Option(help="plateau: steps whose mean loss is compared; default: a thirtieth.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="plateau: the least improvement of a window.")] = 0.01,
    patience: Annotated[int, typer.Option(help="plateau: windows that improve by less.")] = 1,
    patience_counts: Annotated[
        str, typer.Option(help="total (as in XATL's code) | row: a good window starts the count anew.")
    ] = "total",
    copied_rate: Annotated[
        float | None, typer.Option(help="Share of the rate at which what was copied trains, such as 0.3.")
    ] = None,
    masks: Annotated[
        int | None,
        typer.Option(help="Steps in which method msg's masks open, 0: at once; default: a quarter."),
    ] = None,
    scaled_rates: Annotated[
        bool, typer.Option("--scaled-rates", help="What growing made c times as large, at c times the rate.")
    ] = False,
    warm_new: Annotated[int, typer.Option(help="Steps in which the rate of new units rises.")] = 0,
    keep_optimizer: Annotated[
        bool, typer.Option("--keep-optimizer", help="Also save its state; a constant schedule does.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(help="Learn from this model's distribution too: a folder, or the Hub's.")
    ] = None,
    teacher_weight: Annotated[float, typer.Option(help="The teacher's share of the loss.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of both distributions.")] = 1.0,
    drop_layers: Annotated[
        float | None,
        typer.Option(help="Skip layers at random, the deepest in this share of the steps."),
    ] = None,
    drop_tokens: Annotated[
        float | None, typer.Option(help="Share of the tokens that middle layers leave out, such as 0.15.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Text to measure on; default: held out.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints to resume from, 0: none; default: as these.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in float16, on a GPU.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers again, not keep them.")
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels/--no-kernels", help="Mamba of transformers' models on lcikernels."),
    ] = True,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, ...; may be given again.")
    ] = None,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Share the weights out among the processes (FSDP2).")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run, or with the optimizer's state beside MODEL.")
    ] = False,
    seed: Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and what it takes; write nothing.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Train a checkpoint on text; the folder it writes is a checkpoint again."""
    from growth.training.dropping import dropping

    report = growth.train(
        model,
        data,
        folder,
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        sequence_length=sequence_length,
        pack=pack,
        text_field=text_field,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        decay=decay,
        freeze=freeze,
        unfreeze=unfreeze,
        window=window,
        threshold=threshold,
        patience=patience,
        patience_counts=patience_counts,
        copied_rate=copied_rate,
        masks=masks,
        scaled_rates=scaled_rates,
        warm_new=warm_new,
        keep_optimizer=keep_optimizer,
        teacher=teacher,
        teacher_weight=teacher_weight,
        temperature=temperature,
        validation=validation,
        eval_every=eval_every,
        save_every=save_every,
        bf16=bf16,
        fp16=fp16,
        gradient_checkpointing=gradient_checkpointing,
        kernels=kernels,
        report_to=report_to or (),
        callbacks=dropping({"drop_layers": drop_layers, "drop_tokens": drop_tokens}),
        fsdp=fsdp,
        resume=resume,
        seed=seed,
        dry_run=dry_run,
    )
    if as_json:
        say(json.dumps(report.json()))
        return report
    for line in report.lines() if dry_run else ():
        say(line)
    say(str(report))
    return report
