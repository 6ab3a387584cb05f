"""The verb `grow`: a checkpoint and a method in, a larger checkpoint out."""

import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch.distributed import is_torchelastic_launched
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from growth.checkpoint import Checkpoint, chosen_dtype
from growth.engine import made, plan_growth
from growth.errors import refuse, refuse_odd_seed
from growth.families.table import Model
from growth.folders import refuse_existing, refuse_too_large
from growth.lossless import lost
from growth.maps import Maps
from growth.methods import Method, method_of
from growth.methods.learning import RATE, Learning
from growth.plan import Plan, Source
from growth.record import new_record
from growth.report import Report
from growth.sizes import Sizes, json, resized, sizes_of
from growth.writing import SHARD_BYTES, write_checkpoint


def grow(
    src: str | Path,
    dst: str | Path | None = None,
    sizes: Sizes | None = None,
    method: Method | str = "lemon",
    *,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    ffn_size: int | None = None,
    allow_lossy: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Grow the checkpoint `src`, a folder or a Hub id, into a larger one in the new folder `dst`.

    sizes       what the target is to have, or in short form hidden_size, num_layers, num_heads, num_kv_heads
                and ffn_size: see growth.Sizes
    method      one of growth.methods, such as Lemon() or Ligo(data="text"), or the name of one as it is by
                default: stack | interpolate | net2net | lemon | ligo | mango
    allow_lossy grow by a lossless method also where something is lost; the report says what
    dtype       of the target's tensors; default: as the source's
    shard_bytes the largest file
    dry_run     plan only; `dst` may be left out then

    Returns a Report; growth.json in `dst` records the plan. Raises Refusal, with nothing written, where the
    source cannot be read, the target is smaller or does not divide into heads, `dst` exists, a lossless
    method would lose something, the data do not fit the model or fill no batch, or learning diverges.
    """
    method = method_of(method)
    if is_torchelastic_launched():
        raise refuse("growth", "one process", "torchrun", "start it without; training takes several")
    refuse_odd_seed(seed)
    kept = chosen_dtype(dtype)
    if dst is None and not dry_run:
        raise refuse("output folder", "the name of a new folder", "none", "name one, or ask for a dry run")
    if not dry_run:
        refuse_existing(dst)
    began = time.perf_counter()
    source = Source(Checkpoint(src))
    if method.learned and not source.family.learns:
        got = f"{source.family.model_type}, which takes more than that"
        raise refuse(method.name, "a model that learns from windows of text", got, "choose lemon or net2net")
    short = Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size)
    if sizes is not None and short != Sizes():
        raise refuse("sizes", "Sizes, or the short forms", "both", "leave one out")
    config = resized(source.model, sizes or short, method.order)
    target = source.family.model(config, source.model.parts)
    old, new = source.model.architecture, target.architecture
    if not dry_run:
        itemsize = max(source.checkpoint.dtype(name).itemsize for name in source.on_disk.values())
        refuse_too_large(dst, new.parameters * (getattr(torch, kept).itemsize if kept else itemsize))
    maps = method.maps(old, new, seed)
    losses = lost(old, new, maps)
    if method.lossless and losses and not allow_lossy:
        raise _refuse_lossy(method, source.model, config, losses)
    scaled(target, maps)
    operator = None
    if method.learned:
        method = _settled(method, source)
        if not dry_run:
            from growth.learned.expansion import Expansion

            operator = Expansion(method.operator(source, old, new, maps, seed), source, target)
    plan = plan_growth(source, target, maps, seed, operator.recipe if operator else None)
    if kept:
        plan = replace(plan, rows=tuple(replace(row, dtype=kept) for row in plan.rows))
    config.architectures = [target.written_as]
    config.dtype = plan.rows[0].dtype
    lossless, flops = not losses and not method.learned, 0  # learning leaves the lossless start
    if not dry_run:
        flops = _write(dst, source, target, plan, method, operator, losses, lossless, shard_bytes, seed)
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        f"ligo from its {method.start} start" if method.name == "ligo" else method.name,
        lossless,
        time.perf_counter() - began,
        flops,
        (source.parameters, plan.parameters),
        plan,
        tuple(losses),
    )


def scaled(target: Model, maps: Maps) -> None:
    """The configuration's eps, as the maps ask for."""
    for name, factor in maps.eps.items():
        setattr(target.config, name, getattr(target.config, name) * factor)


def _refuse_lossy(method: Method, model: Model, config: PreTrainedConfig, losses: list[str]):
    """With the nearest whole multiple of the width, where that helps."""
    old, name = model.architecture, model.family.fields.hidden
    S, T = old.wires["residual"].size, getattr(config, name)
    layers = getattr(config, model.family.fields.layers[0])
    ways = ["method net2net, which comes close", "--allow-lossy"]
    if T % S:
        larger = model.family.model(
            resized(model, Sizes(hidden=T // S * S + S, layers=layers), method.order), model.parts
        ).architecture
        if not lost(old, larger, method.maps(old, larger)):
            ways.insert(0, f"hidden size {T // S * S + S}")
    got = "; ".join(losses)
    return refuse(method.name, "sizes at which nothing is lost", got, f"choose {', or '.join(ways)}")


def _settled(method: Learning, source: Source) -> Learning:
    """With the rate that follows from the source, unless it is given."""
    if method.learning_rate is not None:
        return method
    return replace(method, learning_rate=RATE / source.model.architecture.wires["residual"].size)


def _write(
    dst: str | Path,
    source: Source,
    target: Model,
    plan: Plan,
    method: Method,
    operator: torch.nn.Module | None,
    losses: list[str],
    lossless: bool,
    shard_bytes: int,
    seed: int,
) -> int:
    """Learn, where the method does, and write: the operations that took."""
    flops, options = 0, {x.name: getattr(method, x.name) for x in fields(method)}
    if operator is not None:
        from growth.learned.fit import examples_for, fit

        examples = examples_for(source, method.data, method.batch_size, method.sequence_length, method.name)
        options |= {"data": examples.fingerprint(), "sequence_length": examples.length}
        how = {name: getattr(method, name) for name in ("steps", "batch_size", "learning_rate")}
        flops, options["training_loss"] = fit(operator, examples, name=method.name, seed=seed, **how)
    how = {
        "parameters": (source.parameters, plan.parameters),
        "from": json(sizes_of(source.model)),
        "to": json(sizes_of(target)),
        "lost": losses,
        "seed": seed,
        **options,
    }
    record = new_record("grow", method.name, source.checkpoint, lossless, plan, **how)
    # Copying counts no operations; dense maps do, and the counter slows small tensors down fivefold.
    with FlopCounterMode(display=False) if method.learned else nullcontext() as counter:
        write_checkpoint(
            dst,
            target.config,
            made(plan, source),
            plan.rows,
            source.checkpoint,
            record,
            shard_bytes=shard_bytes,
        )
    return flops + (counter.get_total_flops() if counter else 0)
