"""The command line: growth inspect | grow | shrink | transfer | train | check | demo."""

import json
import signal
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

import growth
from growth.errors import Alone, Refusal, first_process, refuse
from growth.flags import method_with, told, with_flags  # without torch: --help answers at once
from growth.methods import METHODS

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a larger transformer out of a trained one (grow), a smaller one (shrink), or one that is "
    "cheap to run (transfer), and train it on.",
)
out = Console()
INTERRUPTED = 128 + signal.SIGINT
UsageError = typer.BadParameter.__base__  # typer has click's exceptions, of its own or click's, and names few

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A checkpoint: a folder, or the Hub's owner/name.", show_default=False
    ),
]
Dst = Annotated[str | None, typer.Argument(metavar="DST", help="New folder; may be left out of a dry run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print where every tensor would come from; write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TextField = Annotated[str, typer.Option(help="Of rows, the field that holds the text.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Windows = Annotated[int, typer.Option(help="Windows of the data that the model runs on.")]
Length = Annotated[int | None, typer.Option(help="Tokens a window; default: 512, or the model's positions.")]
Cache = Annotated[
    str | None, typer.Option(help="Folder that keeps what the run finds; default: the user's cache.")
]
Dtype = Annotated[str | None, typer.Option(help="Of the result, such as bfloat16; default: the source's.")]
ShardSize = Annotated[float, typer.Option(help="Largest file, in GB.")]


@app.command()
def inspect(
    src: Src,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe that made it, as grow --recipe takes it.")
    ] = False,
    redundancy: Annotated[
        bool, typer.Option("--redundancy", help="How alike layers and their units are on --data.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Text, as train reads it.")] = None,
    windows: Windows = 32,
    sequence_length: Length = None,
    text_field: TextField = "text",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Wires, sizes and tensors of a checkpoint, and what can be done with it."""
    if data is not None and not redundancy:
        raise refuse("data", "none without --redundancy", data, "leave it out, or add that")
    if recipe and redundancy:
        raise refuse("recipe, redundancy", "one of them", "both", "ask for one at a time")
    if recipe:
        made = growth.recipe_of(src)
        say(json.dumps(made.json()) if as_json else made.yaml().rstrip())
        return
    if not redundancy:
        from growth import inspection  # each verb imports what it needs when it runs

        found = inspection.inspect(src)
        for line in [json.dumps(found.json())] if as_json else found.lines():
            say(line)
        return
    from growth.shrinking.redundancy import redundancy as measured

    how = {"windows": windows, "sequence_length": sequence_length, "text_field": text_field, "cache": cache}
    told = measured(src, data, **how)
    if as_json:
        say(json.dumps(told.json()))
        return
    out.print(told.table())
    for line in told.lines():
        say(line)


def grow(
    src: Src,
    dst: Dst = None,
    method: Annotated[str, typer.Option(help=told(METHODS.values()))] = "lemon",
    hidden_size: Annotated[int | None, typer.Option(help="Width; default: the source's.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers; default: the source's.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads; default: in proportion to the width.")] = None,
    num_kv_heads: Annotated[
        int | None, typer.Option(help="Heads of keys and values; default: in proportion to the heads.")
    ] = None,
    ffn_size: Annotated[
        int | None, typer.Option(help="Neurons of a feed-forward block; default: in proportion to the width.")
    ] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="By lemon also where something is lost.")
    ] = False,
    dtype: Dtype = None,
    shard_size: ShardSize = 2.0,
    optimizer: Annotated[
        str | None,
        typer.Option(help="A Trainer's checkpoint of SRC: its Adam state grows too, and training goes on."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Of that state: copy-scaled | asymmetric-reset | reset.")
    ] = "copy-scaled",
    recipe: Annotated[
        str | None, typer.Option(help="A file of YAML: a chain of verbs, whose result is DST.")
    ] = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
    **options,
) -> Any:
    """Grow a checkpoint into a larger one."""
    given = {name: x for name, x in options.items() if x not in (None, [], ())}
    sizes = growth.Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size)
    if recipe is not None:
        beside = (method, allow_lossy, dtype, shard_size, seed) != ("lemon", False, None, 2.0, 0)
        if given or beside or sizes != growth.Sizes():
            raise refuse("recipe", "no sizes or options beside it", "some", "write them into its steps")
        return _run_recipe(recipe, src, dst, dry_run, as_json)
    report = growth.grow(
        src,
        dst,
        sizes,
        method_with(method, given),
        allow_lossy=allow_lossy,
        dtype=dtype,
        shard_bytes=_bytes(shard_size),
        optimizer=optimizer,
        policy=policy,
        seed=seed,
        dry_run=dry_run,
    )
    _print(report, dry_run, as_json)
    return report


def _run_recipe(recipe: str, src: str, dst: str | None, dry_run: bool, as_json: bool) -> list[Any]:
    """The one name that is given is the output's, but for a dry run, which has none."""
    source, output = (None, src) if dst is None and not dry_run else (src, dst)
    done = growth.run_recipe(recipe, output, source, dry_run=dry_run, as_json=as_json)
    if dry_run:
        for line in [json.dumps(done)] if as_json else done:
            say(line)
    elif not as_json:
        say(f"{output}: {len(done)} steps")
    return done


def _bytes(gigabytes: float) -> int:
    if not 0 < gigabytes < float("inf"):
        raise refuse("shard-size", "more than 0 GB, and finite", gigabytes, "choose a larger number")
    return max(1, int(gigabytes * 10**9))


grow.__signature__ = with_flags(grow)
app.command()(grow)


@app.command()
def shrink(
    src: Src,
    dst: Dst = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width; default: the source's.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers that stay; default: all.")] = None,
    layers: Annotated[str | None, typer.Option(help="Keep exactly these, such as 0,2,5.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads; default: in proportion to the width.")] = None,
    num_kv_heads: Annotated[
        int | None, typer.Option(help="Heads of keys and values; default: in proportion to the heads.")
    ] = None,
    ffn_size: Annotated[
        int | None, typer.Option(help="Neurons of a feed-forward block; default: in proportion to the width.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of each mixture.")] = None,
    score: Annotated[
        str, typer.Option(help="magnitude | activation | redundancy; the latter two take --data.")
    ] = "magnitude",
    data: Annotated[
        str | None, typer.Option(help="Text, as train reads it, to score by and to merge by.")
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge", help="Fold what is removed into what stays; default: with --data."
        ),
    ] = None,
    windows: Windows = 32,
    sequence_length: Length = None,
    text_field: TextField = "text",
    cache: Cache = None,
    dtype: Dtype = None,
    shard_size: ShardSize = 2.0,
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Shrink a checkpoint to the layers and units that it needs most."""
    report = growth.shrink(
        src,
        dst,
        growth.Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size, experts),
        score=score,
        data=data,
        merge=merge,
        windows=windows,
        sequence_length=sequence_length,
        text_field=text_field,
        cache=cache,
        layers=None if layers is None else _whole_numbers("layers", layers),
        dtype=dtype,
        shard_bytes=_bytes(shard_size),
        seed=seed,
        dry_run=dry_run,
    )
    _print(report, dry_run, as_json)


@app.command()
def transfer(
    src: Src,
    dst: Dst = None,
    mixers: Annotated[str, typer.Option(help="retention | mamba | mamba2 | attention")] = "retention",
    pattern: Annotated[
        str | None,
        typer.Option(
            help="A letter a layer, as RRRA: A attention, W in a window, R retention, M Mamba, S Mamba-2."
        ),
    ] = None,
    keep_attention: Annotated[
        str, typer.Option(help="Layers that stay attention, such as 1,11, or auto:2.")
    ] = "",
    copy: Annotated[str, typer.Option(help="norms | mlp | output | all")] = "output",
    decays: Annotated[
        str, typer.Option(help="Of retention: retnet | alibi | learned, or the share that each head keeps.")
    ] = "retnet",
    retention_heads: Annotated[int | None, typer.Option(help="Default: attention's.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Of mixers: published | attention; default: what trains best.")
    ] = None,
    align: Annotated[
        int, typer.Option(help="Steps of fitting each mixer to the attention, with --data.")
    ] = 0,
    data: Annotated[
        str | None,
        typer.Option(help="Text, as train reads it, that mixers are fitted to and layers chosen by."),
    ] = None,
    text_field: TextField = "text",
    format: Annotated[str, typer.Option(help="lci | granitemoehybrid | fla")] = "lci",
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> Any:
    """Transfer a checkpoint to retention, Mamba or Mamba-2 layers (XATL)."""
    report = growth.transfer(
        src,
        dst,
        mixers=mixers,
        pattern=pattern,
        keep_attention=_layers(keep_attention),
        copy=copy,
        decays=_numbers(decays),
        retention_heads=retention_heads,
        start=start,
        align=align,
        data=data,
        text_field=text_field,
        format=format,
        seed=seed,
        dry_run=dry_run,
    )
    _print(report, dry_run, as_json)
    return report


@app.command()
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
    folder: Annotated[str, typer.Option("--out", help="New folder for the result.", show_default=False)],
    steps: Annotated[int, typer.Option(help="Steps of training.", show_default=False)],
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
        report_to=report_to or (),
        callbacks=dropping({"drop_layers": drop_layers, "drop_tokens": drop_tokens}),
        fsdp=fsdp,
        resume=resume,
        seed=seed,
    )
    say(str(report))
    return report


@app.command()
def check(
    src: Src,
    dst: Annotated[
        str, typer.Argument(metavar="DST", help="What was made of it, or another.", show_default=False)
    ],
    text: Annotated[str | None, typer.Option(help="A file whose text they read, not random input.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also how far their greedy continuations agree.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Compare what two models compute; exit code 1 when an equality that growth promised fails."""
    from growth.generating import TOKENS

    agreement = growth.check(src, dst, text=text, generate=TOKENS if generate else 0)
    say(json.dumps(asdict(agreement) | {"kept": agreement.kept}) if as_json else str(agreement))
    return agreement


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, about a minute.")] = False,
    folder: Annotated[
        str, typer.Option("--out", help="New folder for the checkpoints and the report.")
    ] = "growth-demo",
) -> None:
    """The main job, end to end: the text of Python's standard library, and handwritten digits."""
    from growth.demo import run  # and matplotlib, a second that no other verb needs

    run(folder, quick=quick)


def _layers(text: str) -> str | list[int]:
    if text.startswith("auto"):
        return text
    return _whole_numbers("keep-attention", text)


def _whole_numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(layer) for layer in text.split(",") if layer.strip()]
    except ValueError as error:
        raise refuse(flag, "layer numbers such as 1,11", repr(text), "separate them by commas") from error


def _numbers(text: str) -> str | list[float]:
    """Numbers where these are what stands there, else the word."""
    try:
        return [float(x) for x in text.split(",") if x.strip()]
    except ValueError:
        return text


def _print(report, dry_run: bool, as_json: bool) -> None:
    if as_json:
        say(json.dumps(report.json()))
        return
    if dry_run:
        wide = max(len(row.name) for row in report.plan.rows)
        for row in report.plan.rows:
            sources = ", ".join(row.sources) or row.note
            say(f"{row.name:{wide}}  {'x'.join(map(str, row.shape)):12} {row.origin:11} {sources}")
        for name, why in report.plan.dropped.items():
            say(f"dropped {name}: {why}")
    for line in report.lines:
        say(line)
    for note in report.notes:
        say(f"note: {note}")
    if dry_run:
        say(f"{report.plan.bytes:,} bytes on disk, and about {report.plan.memory:,} of memory to make them")
    say(str(report))


def say(line: str) -> None:
    """A line as it is, once: names may hold brackets, and what reads a pipe wants no breaks."""
    if first_process():
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line. A refusal is one line and exit code 2; what is stopped leaves nothing behind."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = _code(app(sys.argv[1:] or ["--help"], "growth", standalone_mode=False))
    except Refusal as refusal:
        if first_process() or isinstance(refusal, Alone):
            print(f"growth: {refusal}", file=sys.stderr)
        code = 2
    except UsageError as error:  # an unknown option, a missing argument, a number that is none
        what, where = error.format_message(), error.ctx.command_path if error.ctx else "growth"
        if first_process():
            print(f"growth: {' '.join(what.split()).rstrip('.')}; see {where} --help", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED and first_process():  # some typers return it by themselves
        print("growth: interrupted", file=sys.stderr)
    sys.exit(code)


def _code(done: Any) -> int:
    """0, but where an equality that was promised does not hold, or typer says otherwise."""
    return done if isinstance(done, int) else int(not getattr(done, "kept", True))


def _stop(number: int, frame) -> None:
    """SIGTERM unwinds as SIGINT does, so that what cleans up does so; a second one is not waited for."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if first_process():
        print("growth: terminated", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
