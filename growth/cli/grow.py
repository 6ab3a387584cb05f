"""growth grow, by a method or by a recipe."""

import json
import os
from typing import Annotated, Any

import typer

import growth
from growth.cli.arguments import (
    DryRun,
    Dst,
    Dtype,
    FFNSize,
    HiddenSize,
    Json,
    NumHeads,
    NumKVHeads,
    Seed,
    ShardSize,
    Src,
    shard_bytes,
)
from growth.cli.flags import method_with, told, with_flags
from growth.cli.printing import print_report, say
from growth.errors import refuse
from growth.methods import METHODS


def grow(
    src: Src,
    dst: Dst = None,
    method: Annotated[str, typer.Option(help=told(METHODS.values()))] = "lemon",
    hidden_size: HiddenSize = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers; default: the source's.")] = None,
    num_heads: NumHeads = None,
    num_kv_heads: NumKVHeads = None,
    ffn_size: FFNSize = None,
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
        usual = ("lemon", False, None, 2.0, None, "copy-scaled", 0)
        beside = (method, allow_lossy, dtype, shard_size, optimizer, policy, seed) != usual
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
        shard_bytes=shard_bytes(shard_size),
        optimizer=optimizer,
        policy=policy,
        seed=seed,
        dry_run=dry_run,
    )
    print_report(report, dry_run, as_json)
    return report


grow.__signature__ = with_flags(grow)


def _run_recipe(recipe: str, src: str, dst: str | None, dry_run: bool, as_json: bool) -> list[Any]:
    """Of one name that is given: the output's, but in a dry run a checkpoint's, where one is there, or the
    recipe names none."""
    from growth.recipes.recipe import read_recipe

    source, output = (src, dst) if dst is not None else (None, src)
    if dst is None and dry_run and (os.path.exists(src) or read_recipe(recipe).source is None):
        source, output = src, None
    done = growth.run_recipe(recipe, output, source, dry_run=dry_run, as_json=as_json)
    if dry_run:
        for line in [json.dumps(done)] if as_json else done:
            say(line)
    elif not as_json:
        say(f"{output}: {len(done)} steps")
    return done
