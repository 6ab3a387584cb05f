"""The verb `grow`: a checkpoint and a method in, a larger checkpoint out."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_torchelastic_launched
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from growth.architecture import Architecture
from growth.checkpoint import Checkpoint, chosen_dtype
from growth.companions import sentence_modules
from growth.depth import firsts
from growth.engine import made, one_thread, plan_growth
from growth.errors import Refusal, refuse, refuse_odd_seed, several
from growth.families.table import Model, in_modules
from growth.folders import refuse_existing, refuse_too_large
from growth.lossless import lost
from growth.maps import Maps
from growth.methods import Method, method_of
from growth.methods.learning import RATE, Learning
from growth.plan import Plan, Recipe, Source
from growth.record import named, new_record
from growth.report import Report
from growth.sizes import Sizes, changed, recorded, resized, sizes_of
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
                default, such as "stack": `growth grow --help` has them all
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
    if not isinstance(sizes, Sizes | None):
        raise refuse("sizes", "growth.Sizes", repr(sizes), "such as Sizes(hidden=768)")
    short = Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size)
    if sizes is not None and short != Sizes():
        raise refuse("sizes", "Sizes, or the short forms", "both", "leave one out")
    if method.learned:
        method = learnable(source, method)
    wanted = sizes or short
    wanted = replace(wanted, layers=method.depth(wanted.layers, source.model.architecture.layers))
    config = resized(source.model, wanted, method.layers)
    target = source.family.model(config, source.model.parts)
    refuse_other_companions(source, target)
    if not dry_run:  # before the maps, which memory may not hold either
        itemsize = max(source.checkpoint.dtype(name).itemsize for name in source.on_disk.values())
        itemsize = getattr(torch, kept).itemsize if kept else itemsize
        refuse_too_large(dst, target.architecture.parameters * itemsize)
    growth = Growth(source, target, method, method.maps(*models(source, target), seed), seed)
    if method.lossless and growth.lost and not allow_lossy:
        raise _refuse_lossy(growth, wanted)
    scale_eps(target.config, growth.maps)
    learned = None
    if method.learned and not dry_run:
        from growth.learned.fit import Learned  # and the trainer, which takes a second to import

        learned = Learned(growth)
    plan = growth.plan(kept, learned and learned.recipe)
    config.architectures = [target.written_as]
    config.dtype = plan.rows[0].dtype
    flops, settings = learned.fit() if learned else (0, {})
    if not dry_run:
        record = growth.record(plan, settings | {"allow_lossy": allow_lossy, "dtype": kept})
        # Copying counts no operations; dense maps do, and the counter slows small tensors down fivefold.
        with FlopCounterMode(display=False) if learned else one_thread() as counter:
            rows = made(plan, source)
            write_checkpoint(dst, config, rows, plan.rows, source.checkpoint, record, shard_bytes=shard_bytes)
        flops += counter.get_total_flops() if counter else 0
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        str(method),
        growth.lossless,
        time.perf_counter() - began,
        flops,
        (source.parameters, plan.parameters),
        plan,
        tuple(growth.lost),
        changed(source.model, target),
        lines=held_still(plan),
    )


@dataclass(frozen=True)
class Growth:
    """A source, what it is to become, and how."""

    source: Source
    target: Model
    method: Method
    maps: Maps
    seed: int

    @cached_property
    def lost(self) -> list[str]:
        return lost(*models(self.source, self.target), self.maps)

    @property
    def lossless(self) -> bool:
        """Learning leaves the lossless start."""
        return not self.lost and not self.method.learned

    def plan(self, dtype: str | None, learned: Callable[[str], Recipe] | None) -> Plan:
        """dtype: of what is written, but for what a model keeps in float32; None for the source's own."""
        plan = plan_growth(self.source, self.target, self.maps, self.seed, learned)
        if dtype is None:
            return plan
        kept = self.target.in_float32 if getattr(torch, dtype).itemsize < 4 else ()
        rows = (replace(row, dtype="float32" if in_modules(row.name, kept) else dtype) for row in plan.rows)
        return replace(plan, rows=tuple(rows))

    def record(self, plan: Plan, settings: dict[str, Any]) -> dict:
        """growth.json: options of the method, and what they are as it turned out."""
        options = {x.name: getattr(self.method, x.name) for x in fields(self.method)}
        if "data" in options:  # which settings have as it was read
            options["data_name"] = named(options["data"])
        return new_record(
            "grow",
            self.method.name,
            self.source.checkpoint,
            self.lossless,
            plan,
            parameters=(self.source.parameters, plan.parameters),
            lost=self.lost,
            seed=self.seed,
            **{"from": recorded(sizes_of(self.source.model)), "to": recorded(sizes_of(self.target))},
            **options | settings,
        )


def held_still(plan: Plan) -> tuple[str, ...]:
    """A line on what training is to hold still at first, where there is such."""
    count, every = sum(row.freeze for row in plan.rows), len(plan.rows)
    if not count:
        return ()
    trained = f"`growth train --freeze transferred` trains the other {every - count} alone"
    return (f"{count} of {every} tensors are to be held still at first: {trained}",)


def models(source: Source, target: Model) -> tuple[Architecture, Architecture]:
    return source.model.architecture, target.architecture


def scale_eps(config: PreTrainedConfig, maps: Maps) -> None:
    """Give a target's configuration the eps that the maps ask for."""
    for name, factor in maps.eps.items():
        setattr(config, name, getattr(config, name) * factor)


def learnable(source: Source, method: Learning) -> Learning:
    """The method with the rate that follows from the source, unless it is given.

    Raises Refusal where the source has no head whose loss it could learn by.
    """
    from growth.training.task import refuse_headless

    refuse_headless(source.model, method.name)
    if method.learning_rate is not None:
        return method
    return replace(method, learning_rate=RATE / source.model.architecture.wires["residual"].size)


def refuse_other_companions(source: Source, target: Model) -> None:
    """Raises Refusal where what lies beside the source would not fit the target; found before any work."""
    widths = (model.wires["residual"].size for model in models(source, target))
    sentence_modules(source.checkpoint.path, tuple(widths))


def _refuse_lossy(growth: Growth, wanted: Sizes) -> Refusal:
    """With sizes nearby, where these help."""
    L, M = (model.layers for model in models(growth.source, growth.target))
    if [j for j in firsts(growth.method.layers(L, M)) if j >= 0] != [*range(L)]:
        ways = ["an order that meets every layer of the source in turn, such as 0,1,1,2", "--allow-lossy"]
    else:
        ways = [*_lossless_near(growth, wanted), "method net2net, which comes close", "--allow-lossy"]
    got = several(growth.lost)
    return refuse(growth.method.name, "sizes at which nothing is lost", got, f"choose {', or '.join(ways)}")


def _lossless_near(growth: Growth, wanted: Sizes) -> list[str]:
    """The least larger heads or width that keep groups whole, else that copy all channels as often."""
    model, method, have = growth.source.model, growth.method, sizes_of(growth.source.model)
    T, near = growth.target.architecture.wires["residual"].size, {}
    if wanted.kv_heads:
        heads = wanted.kv_heads * have.heads // have.kv_heads
        near[f"{heads} heads"] = replace(wanted, heads=heads, hidden=None)
    for whole in (have.hidden // (have.kv_heads or 1), have.hidden):
        if T % whole:
            width = (T // whole + 1) * whole
            near[f"hidden size {width}"] = replace(wanted, hidden=width, heads=None, kv_heads=None)
    for name, sizes in near.items():
        with suppress(Refusal):
            larger = model.family.model(resized(model, sizes, method.layers), model.parts).architecture
            if not lost(model.architecture, larger, method.maps(model.architecture, larger)):
                return [name]
    return []
