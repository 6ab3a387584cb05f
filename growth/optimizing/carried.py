"""Adam's state for a grown model, made of its source's, and the Trainer's state beside it.

    copy-scaled        every copy has the moments of its original under the chain rule (optimizing.duals)
    asymmetric-reset   the first copy of a unit keeps its moments as they were, all other units start anew:
                       S' = [S, 0] of SPARKLING, which breaks the lock between copies that are equal
    reset              all start anew; the schedule and the step go on

What has nothing old to be made of has m = 0. A new row or column inside a tensor shares its count of steps
with the old ones: with v = 0 its first update would be (1 - b1) / sqrt(1 - b2) of the rate, 3.16 of it at
(0.9, 0.999), so v is the mean of the others along that axis. A whole new tensor, as of an added layer, has no
state: Adam begins it at step 0.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth.architecture import Weight
from growth.errors import refuse
from growth.families.table import Model
from growth.loading import on_meta
from growth.maps import Maps
from growth.optimizing.duals import Carry, Moment, carries
from growth.optimizing.policies import Policy
from growth.optimizing.saved import (
    MEANS,
    OPTIMIZER,
    SCHEDULER,
    SQUARES,
    STATE,
    Saved,
    read_saved,
    table_names,
)
from growth.plan import Source

BESIDE = (SCHEDULER, STATE, "rng_state*.pth", "scaler.pt")  # as they are


@dataclass(frozen=True)
class Carried:
    """The state of `saved`, of the source, for the target that the maps make of it."""

    saved: Saved
    source: Source
    target: Model
    maps: Maps
    policy: Policy

    @classmethod
    def of(
        cls, folder: str | Path, source: Source, target: Model, maps: Maps, policy: Policy, learned: bool
    ) -> "Carried":
        """Raises Refusal where `folder` does not hold the state of Adam for the source, and where maps that
        are yet to be learned would have to carry it, and where a mixture's experts would."""
        if learned and policy != "reset":
            expected = "a method whose maps are known before the model is made"
            raise refuse(f"policy {policy}", expected, "one that learns them", "pass --policy reset")
        for model in (source.model, target):
            if model.family.fused:
                got = f"{model.family.model_type}, whose experts are joined in memory"
                remedy = "leave it out: training goes on with a fresh optimizer"
                raise refuse("optimizer", "a model whose tensors on disk are its parameters", got, remedy)
        saved = read_saved(folder, source.model, moments=policy != "reset")
        return cls(saved, source, target, maps, policy)

    @property
    def bytes(self) -> int:
        """What the moments take on disk, once in a file of their own and once in optimizer.pt."""
        kinds = {len(state) - 1 for state in self.saved.states.values()}
        return 2 * 4 * max(kinds, default=0) * self.target.architecture.parameters

    def write(self, folder: Path) -> None:
        """optimizer.pt, and what else the Trainer goes on from. One tensor is in memory at a time; finished
        ones are mapped to a file on the same disk until they are saved."""
        for pattern in BESIDE:
            for file in self.saved.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        with tempfile.TemporaryDirectory(dir=folder.parent) as room:
            torch.save(self.state_dict(Path(room)), folder / OPTIMIZER)

    def state_dict(self, room: Path | None = None) -> dict[str, Any]:
        """As the optimizer of a Trainer of the target takes it. room: a folder for what is made, if any."""
        names = table_names(network := on_meta(self.target), self.target)
        group_of = self._groups()
        in_groups: list[list[str]] = [[] for _ in self.saved.groups]
        memory: list[list[str]] = [[] for _ in self.saved.groups]
        for name, _ in network.named_parameters():
            in_groups[group_of[names[name]]].append(names[name])
            memory[group_of[names[name]]].append(name)
        number = {name: i for i, name in enumerate(name for part in in_groups for name in part)}
        groups = [
            group | {"params": [number[name] for name in part], "param_names": told}
            for group, part, told in zip(self.saved.groups, in_groups, memory, strict=True)
        ]
        state = {} if self.policy == "reset" else {number[x]: of for x, of in self.states(room)}
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def states(self, room: Path | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every tensor of the target that has a state, by its name in the table."""
        only_first = self.policy == "asymmetric-reset"
        kinds = [
            (key, carries(self.source, self.target, self.maps, power, only_first))
            for power, keys in ((1, MEANS), (2, SQUARES))
            for key in keys
        ]
        moments = {
            key: Moment(self.source, {x: of[key] for x, of in self.saved.states.items() if key in of})
            for key, _ in kinds
        }
        for name in self.target.table():
            old = [] if kinds[0][1][name].is_new else self._sources(kinds[0][1][name])
            if not old or not all(x in self.saved.states for x in old):
                continue
            state = {"step": self.saved.states[old[0]]["step"].clone()}
            for key, recipes in kinds:
                if all(x in moments[key].tensors for x in old):
                    made = recipes[name].made(moments[key], filled=key in SQUARES)
                    made = made.to(moments[key].tensors[old[0]].dtype)
                    state[key] = _placed(made, room and room / f"{name}.{key}")
            yield name, state

    def _sources(self, recipe: Carry) -> list[str]:
        """The tensors of the source, by their names in the table, that one of the target is made of."""
        return [
            self.source.place[self.maps.source(weight.name), j][0]
            for weight in recipe.entry.weights
            for j in recipe.layers(weight)
        ]

    def _groups(self) -> dict[str, int]:
        """The group of each tensor of the target: that of what it is made of, or of its like."""
        of_source = {name: i for i, part in enumerate(self.saved.names) for name in part}
        recipes = carries(self.source, self.target, replace(self.maps, mixed=frozenset()), 1)
        found = {}
        for name, recipe in recipes.items():
            weight = recipe.entry.weights[0]
            old = self._sources(recipe) or [self._like(weight)]
            found[name] = of_source[old[0]]
        return found

    def _like(self, weight: Weight) -> str:
        """A tensor of the source that holds this weight, of any layer."""
        return next(held[0] for (name, _), held in self.source.place.items() if name == weight.name)


def _placed(x: Tensor, file: Path | None) -> Tensor:
    """The same numbers, mapped to a file that the system may write out."""
    if file is None:
        return x.contiguous()
    mapped = torch.from_file(str(file), shared=True, size=x.numel(), dtype=x.dtype)
    return mapped.view(x.shape).copy_(x)
