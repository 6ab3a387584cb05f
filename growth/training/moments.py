"""The optimizer's state that a run begins with, and whether what growing left is there as asked."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from growth.checkpoint import Checkpoint
from growth.errors import Refusal, refuse
from growth.families import model_of
from growth.jsonfile import read_object
from growth.optimizing.saved import OPTIMIZER, STATE, joined, parts, read_saved
from growth.training.warming import new_entries


def moments_of(run: Path, model: Checkpoint, resume: bool) -> str | None:
    """What an optimizer's state is known by that a run begins with, or began with; None without.

    To resume where no run was interrupted is to begin with the state that lies beside the model.
    """
    if not resume:
        return None
    if os.path.lexists(run):
        with contextlib.suppress(Refusal):
            return read_object(run / "settings.json").get("moments")
        return None
    file = model.path / OPTIMIZER
    if not file.is_file():
        return None
    step = read_object(model.path / STATE, "global_step")["global_step"]
    return f"{file.stat().st_size} bytes, after {step} steps"


def check_grown(
    model: Checkpoint, asked: Mapping, moments: str | None, resume: bool, args: TrainingArguments
) -> None:
    """Raises Refusal where an optimizer's state or new units are not as asked, or weights in pieces do not go
    with what is; tells of a state that is not used."""
    for name in ("keep_optimizer", "warm_new"):
        if args.fsdp and asked[name]:
            expected, remedy = "a model whose weights are whole", "leave one of the two out"
            raise refuse(name.replace("_", "-"), expected, "fsdp", remedy)
    if asked["warm_new"]:
        new_entries(model.path)
    if moments and not os.path.lexists(args.output_dir):
        seen = model_of(model.config, model.names)
        if seen is None:
            expected, got = "an optimizer's state of a family that growth reads", model.config.model_type
            raise refuse("resume", expected, got, "leave --resume out")
        read_saved(model.path, seen)
    elif not resume and args.process_index == 0 and (model.path / OPTIMIZER).is_file():
        told = "an optimizer's state lies there, which --resume begins with"
        print(f"{model.path}: {told}", file=sys.stderr)


def moments_in_memory(network: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Mapping[str, Tensor]]:
    """The state beside a model, by the names of its parameters in memory."""
    model = model_of(checkpoint.config, checkpoint.names)
    states, known = read_saved(checkpoint.path, model).states, parts(network, model)
    shapes = {name: x.shape for name, x in network.named_parameters()}
    return {
        name: joined([states[part] for part in of], shapes[name])
        for name, of in known.items()
        if all(part in states for part in of)
    }
