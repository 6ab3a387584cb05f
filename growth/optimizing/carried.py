"""Adam's state for a grown model, made of its source's, and the Trainer's state beside it.

    copy-scaled        every copy has the moments of its original under the chain rule (optimizing.duals)
    asymmetric-reset   the first copy of a unit keeps its moments as they were, all other units start anew:
                       S' = [S, 0] of SPARKLING, which breaks the lock between copies that are equal
    reset              all start anew; the schedule and the step go on

What has nothing old to be made of has m = 0. A new row or column inside a tensor shares its count of steps
with the old ones: with v = 0 its first update would be (1 - b1) / sqrt(1 - b2) of the rate, 3.16 of it at
(0.9, 0.999), so v is the mean of the others along that axis, or of the other experts where one tensor in
memory has them all. A whole new tensor, as of an added layer, has no state: Adam begins it at step 0.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    grouped,
    joined,
    parts,
    read_saved,
    refuse_other_weights,
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
        are yet to be learned would have to carry it."""
        if learned and policy != "reset":
            expected = "a method whose maps are known before the model is made"
            raise refuse(f"policy {policy}", expected, "one that learns them", "pass --policy reset")
        saved = read_saved(folder, source.model, moments=policy != "reset")
        refuse_other_weights(saved.folder, source.checkpoint)
        return cls(saved, source, target, maps, policy)

    @property
    def bytes(self) -> int:
        """What the moments take on disk, once in a file of their own and once in optimizer.pt."""
        kinds = {len(state) - 1 for state in self.saved.states.values()}
        return 2 * 4 * max(kinds, default=0) * self.target.architecture.parameters

    def lines(self, dst: str | Path | None) -> tuple[str, ...]:
        """What a report says of it."""
        kept = "starts anew" if self.policy == "reset" else f"grows too ({self.policy})"
        state = f"the optimizer's state of {self.saved.folder}, after {self.saved.steps} steps"
        return (f"{state}, {kept}: `growth train {dst or 'DST'} --resume` goes on from it",)

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
        network, group_of = on_meta(self.target), self._groups()
        shapes = {name: x.shape for name, x in network.named_parameters()}
        made_of = parts(network, self.target)
        in_groups: list[list[str]] = [[] for _ in self.saved.groups]
        for name in shapes:
            in_groups[group_of[made_of[name][0]]].append(name)
        number = {name: i for i, name in enumerate(name for names in in_groups for name in names)}
        groups = [
            group | {"params": [number[name] for name in names], "param_names": names}
            for group, names in zip(self.saved.groups, in_groups, strict=True)
        ]
        state: dict[int, dict[str, Tensor]] = {}
        for name in number if self.policy != "reset" else ():
            each = [self._state(part) for part in made_of[name]]
            if any(each):
                whole = joined(_filled(each), shapes[name])
                state[number[name]] = {
                    key: _placed(x, room and room / f"{name}.{key}") for key, x in whole.items()
                }
        return {"state": state, "param_groups": groups}

    def _state(self, name: str) -> dict[str, Tensor]:
        """Of a tensor of the target, by its name in the table; {} where it has none."""
        recipe = self._recipes[1][name]
        old = [] if recipe.is_new else self._sources(recipe)
        if not old or not all(x in self.saved.states for x in old):
            return {}
        state = {"step": self.saved.states[old[0]]["step"].clone()}
        for power, keys in ((1, MEANS), (2, SQUARES)):
            for key in keys:
                held = {x: self.saved.states[x][key] for x in old if key in self.saved.states[x]}
                if len(held) == len(set(old)):
                    made = self._recipes[power][name].made(Moment(self.source, held), filled=power == 2)
                    state[key] = made.to(held[old[0]].dtype)
        return state

    @cached_property
    def _recipes(self) -> dict[int, dict[str, Carry]]:
        """Of means and of squares, by the power of the gradient."""
        only_first = self.policy == "asymmetric-reset"
        return {power: carries(self.source, self.target, self.maps, power, only_first) for power in (1, 2)}

    def _sources(self, recipe: Carry) -> list[str]:
        """The tensors of the source, by their names in the table, that one of the target is made of."""
        return [
            self.source.place[self.maps.source(weight.name), j][0]
            for weight in recipe.entry.weights
            if weight.name not in self.maps.drawn
            for j in recipe.layers(weight)
        ]

    def _groups(self) -> dict[str, int]:
        """The group of each tensor of the target: that of what it is made of, or of its like, or of one that
        decays as it does."""
        of_source = {name: i for i, names in enumerate(self.saved.names) for name in names}
        decays = {of: _decaying(of) for of in (self.source.model, self.target)}
        found = {}
        for name, recipe in carries(self.source, self.target, self.maps, 1).items():
            weight = self.maps.source(recipe.entry.weights[0].name)
            like = [held[0] for (other, _), held in self.source.place.items() if other == weight]
            alike = (x for x in of_source if decays[self.source.model][x] == decays[self.target][name])
            found[name] = of_source[next(iter([*self._sources(recipe), *like]), None) or next(alike)]
        return found


def _filled(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Of the tensors of one parameter; those without a state get m = 0, and v as the others' mean."""
    if all(states):
        return states
    some = [state for state in states if state]
    new = {key: x.clone() if key == "step" else torch.zeros_like(x) for key, x in some[0].items()}
    new |= {key: torch.stack([state[key] for state in some]).mean(0) for key in new if key in SQUARES}
    return [state or new for state in states]


def _decaying(model: Model) -> dict[str, bool]:
    """Of every tensor of the table: is it in the Trainer's group that decays?"""
    network = on_meta(model)
    decaying = set(grouped(network)[0])
    return {part: name in decaying for name, of in parts(network, model).items() for part in of}


def _placed(x: Tensor, file: Path | None) -> Tensor:
    """The same numbers, mapped to a file that the system may write out."""
    if file is None or not x.dim():
        return x.contiguous()
    if hasattr(os, "posix_fallocate"):  # else a disk that is full kills the process as it writes (SIGBUS)
        with file.open("wb") as room:
            os.posix_fallocate(room.fileno(), 0, x.nbytes)
    mapped = torch.from_file(str(file), shared=True, size=x.numel(), dtype=x.dtype)
    return mapped.view(x.shape).copy_(x)
