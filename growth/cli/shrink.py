"""growth shrink."""

from typing import Annotated, Any

import typer

import growth
from growth.cli.arguments import (
    Cache,
    DryRun,
    Dst,
    Dtype,
    FFNSize,
    HiddenSize,
    Json,
    Length,
    NumHeads,
    NumKVHeads,
    Seed,
    ShardSize,
    Src,
    TextField,
    Windows,
    shard_bytes,
    whole_numbers,
)
from growth.cli.printing import print_report


def shrink(
    src: Src,
    dst: Dst = None,
    hidden_size: HiddenSize = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers that stay; default: all.")] = None,
    layers: Annotated[str | None, typer.Option(help="Keep exactly these, such as 0,2,5.")] = None,
    num_heads: NumHeads = None,
    num_kv_heads: NumKVHeads = None,
    ffn_size: FFNSize = None,
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
) -> Any:
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
        layers=None if layers is None else whole_numbers("layers", layers),
        dtype=dtype,
        shard_bytes=shard_bytes(shard_size),
        seed=seed,
        dry_run=dry_run,
    )
    print_report(report, dry_run, as_json)
    return report
