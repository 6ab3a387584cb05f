"""The verb `grow`: a checkpoint and a method in, a larger checkpoint out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import is_torchelastic_launched
from torch.utils.flop_counter import FlopCounterMode

from growth.architecture import Architecture
from growth.checkpoint import Checkpoint, chosen_dtype
from growth.companions import refuse_broken_companions, refuse_other_companions
from growth.costs.told import costs_of
from growth.engine import made, one_thread, plan_growth
from growth.errors import refuse, refuse_odd_seed
from growth.families.table import Model
from growth.folders import refuse_odd_output, refuse_too_large
from growth.fresh import closed
from growth.lossless import lost
from growth.maps import Maps
from growth.methods import Method, method_of
from growth.optimizing.policies import refuse_odd_policy, told_new
from growth.optimizing.shares import shares
from growth.plan import Plan, Recipe, Source, in_dtype
from growth.record import named, new_record, refuse_closed
from growth.report import Report
from growth.sizes import Sizes, changed, chosen_sizes, followed, recorded, sizes_of
from growth.targets import refuse_lossy, scale_eps, target_of
from growth.writing import SHARD_BYTES, refuse_odd_shards, write_checkpoint

if TYPE_CHECKING:
    from growth.costs.learning import Lesson
    from growth.optimizing.carried import Carried


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
                default, such as "stack": `growth grow --help` has them all. The default is the row "lemon"
                of benchmarks/REUSE.md, which on text saves more than "ligo", "mango" and "stack"
    allow_lossy grow by a lossless method also where something is lost; the report says what
    dtype       of the target's tensors; default: as the source's
    shard_bytes the largest file
    optimizer   the folder of a checkpoint of transformers' Trainer, with the state of Adam that `src` was
                trained with: `dst` has it for the grown model, and a Trainer resumes from it. With a source
                trained at a constant rate, and Lemon(noise=2.0), that is the row "lemon-early", which
                saves most of text's
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
    refuse_odd_shards(shard_bytes)
    refuse_odd_output(dst, dry_run)
    began = time.perf_counter()
    source = Source(Checkpoint(src))
    refuse_closed(source.checkpoint)
    refuse_broken_companions(source.checkpoint.path)
    wanted = chosen_sizes(sizes, Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size))
    growth = Growth.of(source, wanted, method, seed, None if dry_run else dst, kept)
    if growth.method.lossless and growth.lost and not allow_lossy:
        raise refuse_lossy(source.model, growth.target, growth.method, growth.lost, wanted)
    scale_eps(growth.target.config, growth.maps)
    carried = growth.carried(optimizer, policy)
    learned = None if dry_run else growth.method.learner(growth)
    plan = growth.plan(kept, learned and learned.recipe)
    flops, settings = learned.fit() if learned else (0, {})
    if not dry_run:
        settings |= {"allow_lossy": allow_lossy, "dtype": kept, **growth.told()}
        if carried:
            refuse_too_large(dst, plan.bytes + carried.bytes)
            settings |= {"optimizer": str(optimizer), "policy": policy}
        record = growth.record(plan, settings)
        # Copying counts no operations; dense maps do, and the counter slows small tensors down fivefold.
        with FlopCounterMode(display=False) if learned else one_thread() as counter:
            write_checkpoint(
                dst,
                growth.target.config,
                made(plan, source),
                plan.rows,
                source.checkpoint,
                record,
                shard_bytes=shard_bytes,
                also=carried.write if carried else None,
            )
        flops += counter.get_total_flops() if counter else 0
    seconds, costs = time.perf_counter() - began, None
    if dry_run:
        learns = growth.lesson if growth.method.learned else None
        by_learning = f"learning by {growth.method.name}" if learns else ""
        costs = costs_of(
            source,
            growth.target,
            plan,
            dst,
            seconds,
            shard_bytes,
            uncounted=by_learning,
            learns=learns,
        )
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        str(growth.method),
        growth.lossless,
        seconds,
        flops,
        (source.parameters, plan.parameters),
        plan,
        tuple(growth.lost),
        changed(source.model, growth.target),
        settings,
        (*growth.lines(plan, settings), *(carried.lines(dst) if carried else ())),
        costs,
    )


@dataclass(frozen=True)
class Growth:
    """A source, what it is to become, and how."""

    source: Source
    target: Model
    method: Method
    maps: Maps
    seed: int
    followed: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        source: Source,
        wanted: Sizes,
        method: Method,
        seed: int,
        dst: str | Path | None,
        dtype: str | None,
    ) -> "Growth":
        """What is to become of a source in `dst`, where it is written; its configuration is the plain one.

        Raises Refusal where the method or the source is not up to it, or there is no room.
        """
        if method.needs_head:
            from growth.training.task import refuse_headless

            refuse_headless(source.model, method.name)
        target, method = target_of(source.model, wanted, method)
        old, new = source.model.architecture, target.architecture
        refuse_other_companions(source.checkpoint.path, old, new)
        if dst is not None:  # before the maps, which memory may not hold either
            itemsize = max(source.checkpoint.dtype(name).itemsize for name in source.on_disk.values())
            itemsize = getattr(torch, dtype).itemsize if dtype else itemsize
            refuse_too_large(dst, new.parameters * itemsize)
        lines = followed(source.model, target, wanted)
        return cls(source, target, method, method.maps(old, new, seed), seed, lines)

    @property
    def models(self) -> tuple[Architecture, Architecture]:
        """What the maps lead from and to."""
        return self.source.model.architecture, self.target.architecture

    @cached_property
    def lost(self) -> list[str]:
        """A sentence on each op that does not compute what it did."""
        return lost(*self.models, self.maps)

    @property
    def lossless(self) -> bool:
        """Learning leaves a lossless start, unless the method promises otherwise."""
        return not self.lost and (self.method.lossless or not self.method.learned)

    @property
    def closed(self) -> dict[str, Any]:
        """What masks hold closed at first."""
        return closed(*self.models, self.maps) if self.maps.fresh else {}

    def plan(self, dtype: str | None, learned: Callable[[str], Recipe | None] | None) -> Plan:
        """dtype: of what is written, see in_dtype; the target's configuration says what it is."""
        made = plan_growth(self.source, self.target, self.maps, self.seed, learned)
        plan, config = in_dtype(made, self.target, dtype), self.target.config
        config.architectures, config.dtype = [self.target.written_as], plan.rows[0].dtype
        return plan

    def carried(self, optimizer: str | Path | None, policy: str) -> "Carried | None":
        """The optimizer's state that goes along."""
        if optimizer is None:
            return None
        from growth.optimizing.carried import Carried  # and the Trainer

        return Carried.of(optimizer, self.source, self.target, self.maps, policy, self.method.learned)

    def lesson(self) -> "Lesson | None":
        """What its method learns, on paper; None where it learns otherwise than by steps."""
        from growth.costs.learning import lesson_of  # torch without numbers: seconds to import

        return lesson_of(self)

    def told(self) -> dict[str, Any]:
        """What growth.json tells training: what is new, and the rates of what is not."""
        told = {"new": told_new(self.source.model, self.target, self.maps)}
        if not self.method.learned:
            told["shares"] = shares(self.source.model, self.target, self.maps)
        return told

    def lines(self, plan: Plan, settings: dict[str, Any]) -> tuple[str, ...]:
        """What else a report says."""
        errors = settings.get("errors", {})
        return (
            *self.followed,
            *held_still(plan),
            *self.method.lines(*self.models),
            *where_learning_led(settings.get("training_losses", ())),
            *(
                f"{name.replace('{}', '*')}: {error:.1%} of its norm is left out at this rank"
                for name, error in errors.items()
            ),
        )

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


def where_learning_led(losses: Sequence[float]) -> tuple[str, ...]:
    """A line on it, where there was such; batches differ by some hundredths."""
    if not losses:
        return ()
    rose = losses[-1] > 1.1 * losses[0]
    remedy = "; it rose: choose a lower --learning-rate or --noise, or method lemon" if rose else ""
    return (f"training loss of learning: {losses[0]:.3f} to {losses[-1]:.3f}{remedy}",)


def held_still(plan: Plan) -> tuple[str, ...]:
    """A line on what training is to hold still at first, where there is such."""
    count, every = sum(row.freeze for row in plan.rows), len(plan.rows)
    if not count:
        return ()
    trained = f"`growth train --freeze transferred` trains the other {every - count} alone"
    return (f"{count} of {every} tensors are to be held still at first: {trained}",)
