"""growth transfer."""

from typing import Annotated, Any

import typer

import growth
from growth.cli.arguments import DryRun, Dst, Json, Seed, Src, TextField, whole_numbers
from growth.cli.printing import print_report


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
        int | None,
        typer.Option(help="Steps of fitting each mixer to the attention. Default: 100 with --data."),
    ] = None,
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
    print_report(report, dry_run, as_json)
    return report


def _layers(text: str) -> str | list[int]:
    if text.startswith("auto"):
        return text
    return whole_numbers("keep-attention", text)


def _numbers(text: str) -> str | list[float]:
    """Numbers where these are what stands there, else the word."""
    try:
        return [float(x) for x in text.split(",") if x.strip()]
    except ValueError:
        return text
