"""The verb `shrink`: a checkpoint in, a smaller checkpoint out, the way back of `grow`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from growth.checkpoint import Checkpoint, chosen_dtype
from growth.engine import made, one_thread, plan_growth
from growth.errors import refuse, refuse_odd_seed
from growth.families.table import Model
from growth.folders import refuse_existing, refuse_too_large
from growth.growing import chosen_sizes, in_dtype, refuse_other_companions, scale_eps
from growth.methods.option import refuse_other
from growth.plan import Plan, Source
from growth.record import new_record
from growth.report import Report
from growth.shrinking.bonds import Bonds
from growth.shrinking.keeping import Index, Kept, Scores, best, kept, maps, order_of
from growth.shrinking.magnitude import Magnitude
from growth.sizes import Sizes, changed, recorded, resized, sizes_of
from growth.writing import SHARD_BYTES, write_checkpoint

SCORES = ("magnitude", "activation", "redundancy")


def shrink(
    src: str | Path,
    dst: str | Path | None = None,
    sizes: Sizes | None = None,
    *,
    score: str = "magnitude",
    layers: Sequence[int] | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    ffn_size: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Shrink the checkpoint `src`, a folder or a Hub id, into a smaller one in the new folder `dst`."""
    refuse_odd_seed(seed)
    refuse_other("score", score, SCORES)
    dtype = chosen_dtype(dtype)
    if dst is None and not dry_run:
        raise refuse("output folder", "the name of a new folder", "none", "name one, or ask for a dry run")
    if not dry_run:
        refuse_existing(dst)
    began = time.perf_counter()
    source = Source(Checkpoint(src))
    wanted = chosen_sizes(sizes, Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size))
    bonds = Bonds(source.model.architecture)
    scores = Magnitude(source, bonds)
    shrinking = Shrinking.of(source, wanted, layers, bonds, scores)
    target = shrinking.target
    refuse_other_companions(source, target)
    plan = in_dtype(shrinking.plan(seed), target, dtype)
    target.config.architectures = [target.written_as]
    target.config.dtype = plan.rows[0].dtype
    if not dry_run:
        refuse_too_large(dst, plan.bytes)
        record = shrinking.record(plan, score, seed)
        with one_thread():
            rows = made(plan, source)
            write_checkpoint(
                dst, target.config, rows, plan.rows, source.checkpoint, record, shard_bytes=shard_bytes
            )
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        score,
        False,
        time.perf_counter() - began,
        0,
        (source.parameters, plan.parameters),
        plan,
        tuple(shrinking.lost),
        changed(source.model, target),
    )


@dataclass(frozen=True)
class Shrinking:
    """A source, what it is to become, and what of it stays."""

    source: Source
    target: Model
    bonds: Bonds
    kept: Kept

    @classmethod
    def of(
        cls, source: Source, wanted: Sizes, layers: Sequence[int] | None, bonds: Bonds, scores: Scores
    ) -> "Shrinking":
        """Chosen by the scores, but for layers that are given."""
        chosen, wanted = chosen_layers(source.model, wanted, layers, scores)
        config = resized(source.model, wanted, order_of(chosen), "shrink")
        target = source.family.model(config, source.model.parts)
        return cls(source, target, bonds, kept(bonds, target.architecture, chosen, scores))

    def plan(self, seed: int) -> Plan:
        found = maps(self.bonds, self.kept)
        scale_eps(self.target.config, found)
        return plan_growth(self.source, self.target, found, seed)

    @property
    def lost(self) -> Iterator[str]:
        """What is left out, a sentence for each kind."""
        old, new = self.bonds.model, self.target.architecture
        for prefix, layers in self.kept.layers.items():
            L = old.stacks[prefix].layers
            if gone := [str(j) for j in range(L) if j not in layers]:
                yield f"{prefix}layers: {', '.join(gone)} of {L} left out"
        told = set()
        for (name, _), index in self.kept.units.items():
            wire = min(self.bonds.wires(name), key=len)
            if name not in told:
                told.add(name)
                verb = "averaged" if any(of == name for of, _ in self.kept.pools) else "left out"
                units = old.wires[wire].units
                yield f"{wire.replace('{}', '*')}: {units - len(index)} of {units} units {verb}"
        assert new is not None

    def record(self, plan: Plan, score: str, seed: int, **settings: Any) -> dict:
        """growth.json: with the layers and the units that stay, of each class of wires by layer."""
        return new_record(
            "shrink",
            score,
            self.source.checkpoint,
            False,
            plan,
            parameters=(self.source.parameters, plan.parameters),
            lost=list(self.lost),
            seed=seed,
            **{"from": recorded(sizes_of(self.source.model)), "to": recorded(sizes_of(self.target))},
            **settings,
        )


def chosen_layers(
    model: Model, wanted: Sizes, given: Sequence[int] | None, scores: Scores
) -> tuple[Mapping[str, Index], Sizes]:
    """The layers of each stack that stay, and the sizes with their number.

    Raises Refusal where layers are named that are not there, twice, or not as many as are wanted.
    """
    stacks = {prefix: stack.layers for prefix, stack in model.architecture.stacks.items()}
    if given is None:
        n, L = wanted.layers, min(stacks.values())
        fits = type(n) is int and 0 < n < L and len(set(stacks.values())) == 1  # else resized refuses it
        return {
            prefix: best(scores.layers(prefix), n) if fits else tuple(range(L))
            for prefix, L in stacks.items()
        }, wanted
    L = min(stacks.values())
    chosen = tuple(sorted(given))
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] < L:
        got = ",".join(map(str, given)) or "none"
        raise refuse("layers", f"some out of 0 to {L - 1}, each once", got, "name those that stay")
    if wanted.layers not in (None, len(chosen)):
        got = f"{len(chosen)}, {','.join(map(str, chosen))}"
        raise refuse("layers", f"{wanted.layers}, the number of layers", got, "leave num-layers out")
    return dict.fromkeys(stacks, chosen), replace(wanted, layers=len(chosen))
