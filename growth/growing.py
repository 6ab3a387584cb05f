"""The verb `grow`: a checkpoint and a method in, a larger checkpoint out."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
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
from growth.families.sparse import sparse
from growth.families.table import Model, in_modules
from growth.folders import refuse_existing, refuse_too_large
from growth.fresh import closed
from growth.lossless import lost
from growth.maps import Maps
from growth.methods import Method, method_of
from growth.methods.learning import RATE
from growth.methods.upcycle import Upcycle
from growth.optimizing.policies import refuse_odd_policy, told_new
from growth.optimizing.shares import shares
from growth.plan import Plan, Recipe, Source
from growth.record import named, new_record, refuse_closed
from growth.report import Report
from growth.sizes import FLAGS, Sizes, changed, recorded, resized, sizes_of
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
    optimizer: str | Path | None = None,
    policy: str = "copy-scaled",
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
    optimizer   the folder of a checkpoint of transformers' Trainer, with the state of Adam that `src` was
                trained with: `dst` has it for the grown model, and a Trainer resumes from it
    policy      what becomes of it: copy-scaled | asymmetric-reset | reset (growth.optimizing.carried)
    dry_run     plan only; `dst` may be left out then

    Returns a Report; growth.json in `dst` records the plan. Raises Refusal, with nothing written, where the
    source cannot be read, the target is smaller or does not divide into heads, `dst` exists, a lossless
    method would lose something, `optimizer` holds the state of another model or of no Adam, the data do not
    fit the model or fill no batch, or learning diverges.
    """
    method = method_of(method)
    if is_torchelastic_launched():
        raise refuse("growth", "one process", "torchrun", "start it without; training takes several")
    refuse_odd_seed(seed)
    refuse_odd_policy(policy, optimizer)
    kept = chosen_dtype(dtype)
    if dst is None and not dry_run:
        raise refuse("output folder", "the name of a new folder", "none", "name one, or ask for a dry run")
    if not dry_run:
        refuse_existing(dst)
    began = time.perf_counter()
    source = Source(Checkpoint(src))
    refuse_closed(source.checkpoint)
    wanted = chosen_sizes(sizes, Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size))
    if method.learned:
        method = learnable(source, method)
    target, method = target_of(source.model, wanted, method)
    config = target.config
    refuse_other_companions(source, target)
    if not dry_run:  # before the maps, which memory may not hold either
        itemsize = max(source.checkpoint.dtype(name).itemsize for name in source.on_disk.values())
        itemsize = getattr(torch, kept).itemsize if kept else itemsize
        refuse_too_large(dst, target.architecture.parameters * itemsize)
    growth = Growth(source, target, method, method.maps(*models(source, target), seed), seed)
    if method.lossless and growth.lost and not allow_lossy:
        raise _refuse_lossy(growth, wanted)
    scale_eps(target.config, growth.maps)
    carried = None
    if optimizer is not None:
        from growth.optimizing.carried import Carried  # and the Trainer

        carried = Carried.of(optimizer, source, target, growth.maps, policy, method.learned)
    learned = method.learner(growth) if method.learned and not dry_run else None
    plan = growth.plan(kept, learned and learned.recipe)
    config.architectures = [target.written_as]
    config.dtype = plan.rows[0].dtype
    flops, settings = learned.fit() if learned else (0, {})
    if not dry_run:
        settings |= {"allow_lossy": allow_lossy, "dtype": kept}
        if carried:
            refuse_too_large(dst, plan.bytes + carried.bytes)
            settings |= {"optimizer": str(optimizer), "policy": policy}
        settings |= {"new": told_new(source.model, target, growth.maps)}
        if not method.learned:
            settings |= {"shares": shares(source.model, target, growth.maps)}
        record = growth.record(plan, settings)
        # Copying counts no operations; dense maps do, and the counter slows small tensors down fivefold.
        with FlopCounterMode(display=False) if learned else one_thread() as counter:
            rows = made(plan, source)
            write_checkpoint(
                dst,
                config,
                rows,
                plan.rows,
                source.checkpoint,
                record,
                shard_bytes=shard_bytes,
                also=carried.write if carried else None,
            )
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
        settings,
        (
            *held_still(plan),
            *method.lines(*models(source, target)),
            *(
                f"{name.replace('{}', '*')}: {error:.1%} of its norm is left out at this rank"
                for name, error in settings.get("errors", {}).items()
            ),
            *(carried.lines(dst) if carried else ()),
        ),
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
        """Learning leaves a lossless start, unless the method promises otherwise."""
        return not self.lost and (self.method.lossless or not self.method.learned)

    @property
    def closed(self) -> dict[str, Any]:
        """What masks hold closed at first."""
        return closed(*models(self.source, self.target), self.maps) if self.maps.fresh else {}

    def plan(self, dtype: str | None, learned: Callable[[str], Recipe | None] | None) -> Plan:
        """dtype: of what is written, see in_dtype."""
        made = plan_growth(self.source, self.target, self.maps, self.seed, learned)
        return in_dtype(made, self.target, dtype)

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
            **({"closed": held} if (held := self.closed) else {}),
            **options | settings,
        )


def held_still(plan: Plan) -> tuple[str, ...]:
    """A line on what training is to hold still at first, where there is such."""
    count, every = sum(row.freeze for row in plan.rows), len(plan.rows)
    if not count:
        return ()
    trained = f"`growth train --freeze transferred` trains the other {every - count} alone"
    return (f"{count} of {every} tensors are to be held still at first: {trained}",)


def chosen_sizes(sizes: Sizes | None, short: Sizes) -> Sizes:
    """Those given, or in short form; a refusal where both are."""
    if not isinstance(sizes, Sizes | None):
        raise refuse("sizes", "growth.Sizes", repr(sizes), "such as Sizes(hidden=768)")
    if sizes is not None and short != Sizes():
        raise refuse("sizes", "Sizes, or the short forms", "both", "leave one out")
    return sizes or short


def in_dtype(plan: Plan, target: Model, dtype: str | None) -> Plan:
    """A plan that writes in this dtype, but for what a model keeps in float32; None for the source's own."""
    if dtype is None:
        return plan
    kept = target.in_float32 if getattr(torch, dtype).itemsize < 4 else ()
    rows = (replace(row, dtype="float32" if in_modules(row.name, kept) else dtype) for row in plan.rows)
    return replace(plan, rows=tuple(rows))


def models(source: Source, target: Model) -> tuple[Architecture, Architecture]:
    return source.model.architecture, target.architecture


def scale_eps(config: PreTrainedConfig, maps: Maps) -> None:
    """Give a target's configuration the eps that the maps ask for."""
    for name, factor in maps.eps.items():
        setattr(config, name, getattr(config, name) * factor)


def learnable(source: Source, method: Method) -> Method:
    """The method with the rate that follows from the source, where it has one and is not given it.

    Raises Refusal where the source has no head whose loss it could learn by.
    """
    from growth.training.task import refuse_headless

    if getattr(method, "steps", 1):
        refuse_headless(source.model, method.name)
    if getattr(method, "learning_rate", 0.0) is not None:
        return method
    return replace(method, learning_rate=RATE / source.model.architecture.wires["residual"].size)


def target_of(model: Model, wanted: Sizes, method: Method) -> tuple[Model, Method]:
    """What a model becomes, and the method with all that follows from the model."""
    if isinstance(method, Upcycle):
        refuse_sizes(wanted)
        return upcycled(model, method)
    wanted = replace(wanted, layers=method.depth(wanted.layers, model.architecture.layers))
    target = model.family.model(resized(model, wanted, method.layers), model.parts)
    refuse_other_sizes(method, changed(model, target))
    return target, method


def refuse_other_sizes(method: Method, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises Refusal where a size would change that the method cannot grow."""
    if others := [size for size in sizes if size not in method.grows]:
        got = ", ".join(f"{size} {sizes[size][0]} -> {sizes[size][1]}" for size in others)
        expected, remedy = f"{' or '.join(sorted(method.grows))} alone to grow", "grow that first, by lemon"
        raise refuse(method.name, expected, got, remedy)


def upcycled(model: Model, method: Upcycle) -> tuple[Model, Upcycle]:
    """The mixture of experts that a model becomes, and the method with all that was not said."""
    convert = sparse(model, method.format)  # before experts are counted: a family may have no place for any
    known = method.told(model.architecture)
    return convert(known.experts, known.top_k, known.granularity, known.every), known


def refuse_sizes(wanted: Sizes) -> None:
    """Raises Refusal where a size is asked for of a method that leaves sizes as they are."""
    for name, size in asdict(wanted).items():
        if size is not None:
            remedy = "leave it out, and grow the result"
            raise refuse(FLAGS[name], "none, for upcycle leaves sizes as they are", size, remedy)


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
