"""What a source becomes: which layers and units stay, the plan that makes it, and what growth.json tells."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from growth.architecture import STREAM, Linear, Output
from growth.engine import plan_growth
from growth.errors import refuse
from growth.expand import Expand
from growth.families.table import Model
from growth.plan import Plan, Source
from growth.record import new_record
from growth.shrinking.bonds import Bonds, Place
from growth.shrinking.keeping import Index, Kept, Scores, best_of_kinds, kept, maps, order_of
from growth.shrinking.merging import Merged
from growth.sizes import Sizes, recorded, resized, sizes_of
from growth.targets import scale_eps

HEADLESS = ("last_hidden_state", "pooler_output")  # what a model without a head gives, in its ops' order


@dataclass(frozen=True)
class Smaller:
    """A source, what it is to become, and what of it stays."""

    source: Source
    target: Model
    bonds: Bonds
    kept: Kept

    @classmethod
    def of(
        cls, source: Source, wanted: Sizes, layers: Sequence[int] | None, bonds: Bonds, scores: Scores
    ) -> "Smaller":
        """Chosen by the scores, but for layers that are given."""
        chosen, wanted = chosen_layers(source.model, wanted, layers, scores)
        config = resized(source.model, wanted, order_of(chosen), "shrink")
        target = source.family.model(config, source.model.parts)
        found = kept(bonds, target.architecture, chosen, scores)
        for name, (wire, values) in source.family.by_unit(source.config).items():
            if (index := found.units.get(bonds.place(wire, None))) is not None:
                setattr(config, name, [values[i] for i in index])
        return cls(source, target, bonds, found)

    def plan(self, folded: Merged, seed: int) -> Plan:
        """Copies of what stays of a source whose weights were folded; its eps go into the configuration."""
        target, old = self.target, self.bonds.model
        found = replace(maps(self.bonds, self.kept, target.architecture), eps=folded.eps)
        scale_eps(target.config, found)
        plan, table = plan_growth(folded, target, found, seed), target.table()
        rows = []
        for row in plan.rows:
            entry, layer = table[row.name]
            j = None if layer is None else self.kept.layers[old.stack_of(entry.weights[0].name)[0]][layer]
            if any((self.kept.made_of(weight.name, j), j) in folded.folds for weight in entry.weights):
                recipe = Expand(entry, layer, found, old, target.architecture, seed)
                row = replace(row, recipe=recipe, origin="fitted" if folded.found else "expanded")
            rows.append(row)
        return replace(plan, rows=tuple(rows))

    def lost(self, merged: bool) -> Iterator[str]:
        """What is left out, a sentence for each kind."""
        old, told = self.bonds.model, set()
        for prefix, layers in self.kept.layers.items():
            L = old.stacks[prefix].layers
            if gone := [str(j) for j in range(L) if j not in layers]:
                numbers = f"number{'s' if len(gone) > 1 else ''} {', '.join(gone)}"
                yield f"{prefix}layers: {len(gone)} of {L} left out, {numbers}"
        pooled = {name for name, _ in self.kept.pools}
        for (name, _), index in self.kept.units.items():
            wires = self.bonds.wires(name)
            wire = STREAM if STREAM in wires else wires[0]
            if name not in told and told.add(name) is None:
                units = old.wires[wire].units
                what = f"{units - len(index)} of {units} units left out"
                if name in pooled:
                    what = f"{units} units become {len(index)}, as means of neighbours"
                elif merged:
                    what += ", merged into those that stay as far as these tell them"
                yield f"{wire.replace('{}', '*')}: {what}"

        for index in list(self.kept.experts.values())[:1]:
            E = old.wires["experts.{}"].units
            yield f"experts.*: {E - len(index)} of {E} left out of each mixture"

    def told(self, scores: "Noted") -> dict[str, Any]:
        """What stays, with its scores, as growth.json has it."""
        layers = [
            {"stack": prefix, "kept": list(index), "scores": scores.of_layers.get(prefix)}
            for prefix, index in self.kept.layers.items()
        ]
        units = []
        for place, index in self.kept.units.items():
            row = {"wires": self.bonds.wires(place[0]), "layer": place[1], "kept": list(index)}
            if (all_of := scores.of_units.get(place)) is not None:
                stays = torch.zeros(len(all_of), dtype=torch.bool).index_fill(0, torch.tensor(index), True)
                means = {"score_kept": all_of[stays].mean(), "score_dropped": all_of[~stays].mean()}
                row |= {name: x.item() for name, x in means.items() if not x.isnan()}
            units.append(row)
        for layer, index in self.kept.experts.items():
            found = scores.of_experts[layer]
            units.append({"wires": ["experts.{}"], "layer": layer, "kept": list(index), "scores": found})
        given = [op.reads for op in self.bonds.model.ops if isinstance(op, Output)]
        outputs = {
            name: self.kept.units.get(self.bonds.place(wire, None)) for name, wire in zip(HEADLESS, given)
        }
        return {"layers": layers, "units": units, "outputs": {k: list(x) for k, x in outputs.items() if x}}

    def record(self, plan: Plan, score: str, seed: int, settings: dict[str, Any]) -> dict:
        """growth.json: with the layers and the units that stay, of each class of wires by layer."""
        return new_record(
            "shrink",
            score,
            self.source.checkpoint,
            False,
            plan,
            parameters=(self.source.parameters, plan.parameters),
            lost=list(self.lost(settings["merge"])),
            seed=seed,
            **{"from": recorded(sizes_of(self.source.model)), "to": recorded(sizes_of(self.target))},
            **settings,
        )


class Noted:
    """Scores that remember what they were asked."""

    def __init__(self, scores: Scores):
        self.scores = scores
        self.of_layers: dict[str, list[float]] = {}
        self.of_units: dict[Place, Tensor] = {}
        self.of_experts: dict[int, list[float]] = {}

    def layers(self, prefix: str) -> Tensor:
        found = self.scores.layers(prefix)
        self.of_layers[prefix] = found.tolist()
        return found

    def units(self, place: Place, most: int, block: int = 1) -> Tensor:
        found = self.scores.units(place, most, block)
        if block == 1:
            self.of_units[place] = found
        return found

    def experts(self, router: Linear, layer: int) -> Tensor:
        found = self.scores.experts(router, layer)
        self.of_experts[layer] = found.tolist()
        return found


def chosen_layers(
    model: Model, wanted: Sizes, given: Sequence[int] | None, scores: Scores | None
) -> tuple[Mapping[str, Index], Sizes]:
    """The layers of each stack that stay, and the sizes with their number; without scores some of as many.

    Raises Refusal where layers are named that are not there, twice, or not as many as are wanted.
    """
    stacks = {prefix: stack.layers for prefix, stack in model.architecture.stacks.items()}
    if given is None:
        n, L = wanted.layers, min(stacks.values())
        if not (
            type(n) is int and 0 < n < L and len(set(stacks.values())) == 1
        ):  # resized refuses what is odd
            return {prefix: tuple(range(depth)) for prefix, depth in stacks.items()}, wanted
        found = model.architecture.stacks.items()
        if scores is None:
            return {prefix: best_of_kinds(torch.zeros(L), of.kinds, n) for prefix, of in found}, wanted
        return {prefix: best_of_kinds(scores.layers(prefix), of.kinds, n) for prefix, of in found}, wanted
    L = min(stacks.values())
    named = tuple(given) if isinstance(given, Iterable) else (given,)
    if not named or len(set(map(str, named))) < len(named) or any(x not in range(L) for x in named):
        got = ",".join(map(str, named)) or "none"
        raise refuse("layers", f"some out of 0 to {L - 1}, each once", got, "name those that stay")
    chosen = tuple(sorted(map(int, named)))
    if wanted.layers not in (None, len(chosen)):
        got = f"{len(chosen)}, {','.join(map(str, chosen))}"
        raise refuse("layers", f"{wanted.layers}, the number of layers", got, "leave num-layers out")
    return dict.fromkeys(stacks, chosen), replace(wanted, layers=len(chosen))
