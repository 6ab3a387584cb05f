"""What a transformers Trainer saved of Adam: its moments by the names of the model's tensors.

    optimizer.pt          {"state": {number: {step, exp_avg, exp_avg_sq}}, "param_groups": [...]}
    scheduler.pt          the learning rate's
    trainer_state.json    the step, the log, the callbacks' states

The Trainer numbers parameters as its groups hold them and writes no names. They follow from the model: its
groups are what decays and what does not, each in the order of named_parameters(). Where torch wrote
`param_names`, as it does for the groups of training.rates, these are taken.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from growth.checkpoint import Checkpoint
from growth.errors import reason, refuse
from growth.families.table import Model
from growth.jsonfile import read_object
from growth.loading import on_meta

OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
MEANS, SQUARES = ("exp_avg",), ("exp_avg_sq", "max_exp_avg_sq")
ADAM = {"step", *MEANS, *SQUARES}
# What tells an optimizer by the names of its state.
OTHERS = {
    "exp_avg_sq_row": "Adafactor",
    "exp_inf": "Adamax",
    "state1": "an optimizer in 8 bits",
    "absmax1": "an optimizer in 8 bits",
    "codes": "an optimizer in 8 bits",
    "momentum_buffer": "Muon or SGD",
    "square_avg": "RMSprop",
    "sum": "Adagrad",
    "projector": "GaLore",
}
AGAIN = "save a checkpoint with Adam's whole state, or pass --policy reset"


@dataclass(frozen=True)
class Saved:
    """A Trainer's state of one model.

    groups: without their parameters; names: of each group's, as in the model's table. states: of each tensor
    by that name, none for those that never had a gradient.
    """

    folder: Path
    groups: tuple[dict[str, Any], ...]
    names: tuple[tuple[str, ...], ...]
    states: Mapping[str, Mapping[str, Tensor]]

    @property
    def steps(self) -> int:
        return int(read_object(self.folder / STATE, "global_step")["global_step"])


def read_saved(folder: str | Path, model: Model, moments: bool = True) -> Saved:
    """The state in `folder` of a model; its tensors stay in their file until they are used. Without `moments`
    its groups alone, of any optimizer.

    Raises Refusal where a file is missing or damaged, where the optimizer is not Adam, and where the state is
    of another model or in pieces.
    """
    folder = Path(folder)
    refuse_pieces(folder)
    for name in (OPTIMIZER, SCHEDULER, STATE):
        if not (folder / name).is_file():
            remedy = "name a checkpoint-N folder of a Trainer, or what growth train --keep-optimizer wrote"
            raise refuse(f"optimizer {folder}", f"{OPTIMIZER}, {SCHEDULER} and {STATE}", f"no {name}", remedy)
    steps = read_object(folder / STATE, "global_step")["global_step"]
    if not isinstance(steps, int) or steps < 0:
        raise refuse(f"{folder / STATE}: global_step", "a number of steps", repr(steps), "save it again")
    state, groups = _read(folder / OPTIMIZER)
    network = on_meta(model)
    known, shapes = parts(network, model), {name: x.shape for name, x in network.named_parameters()}
    in_groups = _named(folder, network, groups)
    flat = [name for names in in_groups for name in names]
    numbers = [i for group in groups for i in group["params"]]
    by_name = {name: state[i] for name, i in zip(flat, numbers, strict=True) if moments and i in state}
    _refuse_others(folder, by_name)
    _refuse_other_shapes(folder, by_name, shapes)
    states = {part: of for name, x in by_name.items() for part, of in _split(x, known[name])}
    plain = tuple({k: x for k, x in group.items() if k not in ("params", "param_names")} for group in groups)
    names = tuple(tuple(part for name in group for part in known[name]) for group in in_groups)
    return Saved(folder, plain, names, states)


def refuse_other_weights(folder: Path, source: Checkpoint) -> None:
    """Raises Refusal where other weights lie beside a state than those that it is to go along with, which may
    be in another dtype."""
    if not (folder / "config.json").is_file() or os.path.samefile(folder, source.path):
        return
    beside = Checkpoint(folder)
    for name in sorted(set(beside.names) & set(source.names)):
        same = beside.shape(name) == source.shape(name)
        for x, y in zip(beside.blocks(name), source.blocks(name), strict=False) if same else ():
            dtype = min(x.dtype, y.dtype, key=lambda kind: kind.itemsize)
            same = same and torch.equal(x.to(dtype), y.to(dtype))
        if not same:
            expected, got = f"the state of {source.path}'s own training", f"that of other weights ({name})"
            remedy = "grow the model in that folder, or name the checkpoint that SRC was trained in"
            raise refuse(f"optimizer {folder}", expected, got, remedy)


def refuse_pieces(folder: Path) -> None:
    """Raises Refusal where a state lies in the pieces that several processes wrote, or is not there."""
    if not folder.is_dir():
        raise refuse(f"optimizer {folder}", "a folder", "none", "name a checkpoint-N folder of a Trainer")
    found = {
        "DeepSpeed's": [*folder.glob("global_step*"), *folder.glob("zero_to_fp32.py")],
        "FSDP's": [*folder.glob("optimizer_[0-9]*"), *folder.glob("pytorch_model_fsdp*")],
        "one of sagemaker's or XLA's": [*folder.glob("rank*-of-*"), *folder.glob("optimizer.pt_*")],
    }
    for kind, files in found.items():
        if files:
            remedy = "resume that run on one process and save a checkpoint there, or pass --policy reset"
            got = f"{kind} ({files[0].name})"
            raise refuse(f"optimizer {folder}", "a state in one piece", got, remedy)


def _read(file: Path) -> tuple[dict[int, dict[str, Tensor]], list[dict[str, Any]]]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        state, groups = found["state"], found["param_groups"]
        numbers = [i for group in groups for i in group["params"]]
        whole = all(isinstance(x, dict) for x in state.values()) and set(state) <= set(numbers)
    except Exception as error:  # what is no such file raises whatever the reader that meets it does
        raise refuse(str(file), "an optimizer's state as torch saves it", reason(error), AGAIN) from error
    if not whole:
        raise refuse(str(file), "an optimizer's state as torch saves it", "another", AGAIN)
    return state, groups


def parts(network: nn.Module, model: Model) -> dict[str, tuple[str, ...]]:
    """Of every parameter in memory, by the name that named_parameters() gives it: the tensors of the table
    that it is made of, in order. That is one, but for experts' matrices, which are joined."""
    table, own = model.table(), {}
    for name, x in network.named_parameters(remove_duplicate=False):
        if (named := model.named(name)) in table:
            own.setdefault(id(x), (named,))
        for pattern, joined in model.family.fused.items():
            if found := tuple(part for part in table if _joined(pattern, joined, part) == name):
                own.setdefault(id(x), found)
    return {name: own[id(x)] for name, x in network.named_parameters() if id(x) in own}


def _joined(pattern: str, joined: str, part: str) -> str | None:
    return re.sub(pattern, joined, part) if re.fullmatch(pattern, part) else None


def _split(state: Mapping[str, Tensor], names: Sequence[str]) -> list[tuple[str, dict[str, Tensor]]]:
    """The state of a parameter as those of the tensors that it is made of."""
    if len(names) == 1:
        return [(names[0], dict(state))]
    each = {key: x.reshape(len(names), -1, x.shape[-1]) if x.dim() else x for key, x in state.items()}
    return [(name, {key: x[i] if x.dim() else x for key, x in each.items()}) for i, name in enumerate(names)]


def joined(states: Sequence[Mapping[str, Tensor]], shape: Sequence[int]) -> dict[str, Tensor]:
    """The state of a parameter of those of the tensors that it is made of."""
    if len(states) == 1:
        return dict(states[0])
    return {
        key: torch.stack([state[key] for state in states]).reshape(shape) if x.dim() else x
        for key, x in states[0].items()
    }


def grouped(network: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the parameters in the Trainer's groups: what decays, and what does not."""
    decaying = set(Trainer.get_decay_parameter_names(None, network))  # looks at the network alone
    names = [name for name, _ in network.named_parameters()]
    return tuple(x for x in names if x in decaying), tuple(x for x in names if x not in decaying)


def _named(folder: Path, network: PreTrainedModel, groups: Sequence[dict]) -> tuple[tuple[str, ...], ...]:
    """The names of each group's parameters."""
    names, usual = tuple(name for name, _ in network.named_parameters()), grouped(network)
    told = [group.get("param_names") for group in groups]
    sizes = [len(group["params"]) for group in groups]
    if all(told) and sorted(x for part in told for x in part) == sorted(names):
        return tuple(tuple(part) for part in told)
    for parts in (usual, (names,)):
        if [len(part) for part in parts] == sizes:
            return parts
    counts = " and ".join(str(len(part)) for part in usual)
    got = " and ".join(map(str, sizes)) + (" of other names" if all(told) else "")
    expected = f"a state of this model's {len(names)} parameters, {counts} in the Trainer's groups"
    raise refuse(f"optimizer {folder}", expected, got, "name the checkpoint that SRC was trained in")


def _refuse_others(folder: Path, states: Mapping[str, Mapping[str, Any]]) -> None:
    for state in states.values():
        if not {"step", "exp_avg", "exp_avg_sq"} <= set(state) <= ADAM:
            kind = next((kind for key, kind in OTHERS.items() if key in state), ", ".join(map(str, state)))
            if kind == "exp_avg":
                kind = "Lion"
            raise refuse(f"optimizer {folder}", "Adam or AdamW", kind, AGAIN)


def _refuse_other_shapes(folder: Path, states: Mapping, shapes: Mapping[str, torch.Size]) -> None:
    for name, state in states.items():
        for key in set(state) - {"step"}:
            if state[key].shape != shapes[name]:
                expected, got = tuple(shapes[name]), tuple(state[key].shape)
                remedy = "name the checkpoint that SRC was trained in"
                raise refuse(f"optimizer {folder}: {name}", f"moments of shape {expected}", got, remedy)
