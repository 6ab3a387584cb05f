"""FSDP2, and checkpoints in pieces, as it writes them: read into any model, sharded or whole.

pytorch_model_fsdp_0/    model.NAME
optimizer_0/             optimizer.state.NAME.exp_avg, ...        (torch.distributed.checkpoint)
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from growth.errors import refuse
from growth.training.pieces import Pieces

WEIGHTS, MOMENTS = "pytorch_model_fsdp_0", "optimizer_0"
ASKED, EMPTY = "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"  # how accelerate launch tells


def shards(asked: bool) -> bool:
    """Whether processes share the weights out among them: as asked here or of `accelerate launch --use_fsdp`,
    where there are several. Each reads the checkpoint itself, whatever accelerate says."""
    asked = asked or os.environ.get(ASKED, "false").lower() == "true"
    wanted = asked and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if asked:
        os.environ |= {ASKED: str(wanted).lower(), EMPTY: "false"}
    return wanted


def blocks(model: nn.Module) -> list[str]:
    """The kinds of modules that are sharded each by itself: those that the model names and has, but for what
    holds its embedding, which accelerate shards alone.

    Raises Refusal where modules other than the embedding and the head share a tensor: BERT's bias.
    """
    embedding = model.get_input_embeddings()
    once = {name for name, _ in model.named_parameters()}
    for name, x in model.named_parameters(remove_duplicate=False):
        if name not in once and x is not embedding.weight:
            got = f"{name}, which another shares"
            raise refuse("fsdp", "one owner for each tensor but the embedding", got, "train without --fsdp")
    inside = {type(x).__name__ for x in model.modules() if all(y is not embedding for y in x.modules())}
    return sorted(inside & set(model._no_split_modules or ()))


def reshard(model: nn.Module) -> None:
    """Lets go of weights that a forward gathered and FSDP kept for a backward; the optimizer has others."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(checkpoint: str | Path) -> bool:
    """Whether a checkpoint of the Trainer's is in pieces."""
    return (Path(checkpoint) / WEIGHTS).is_dir()


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """The weights of a checkpoint in pieces. Raises Refusal where it has not all of them."""
    state, there = model.state_dict(), _names(checkpoint / WEIGHTS)
    found = {f"model.{name}": x for name, x in state.items() if f"model.{name}" in there}
    parameters = dict(model.named_parameters())  # tied ones once
    if lost := sorted(name for name in parameters.keys() & state if f"model.{name}" not in found):
        raise refuse(str(checkpoint), "a tensor for every weight", f"none for {lost[0]}", "remove it")
    _load(found, checkpoint / WEIGHTS)


def copy_weights(source: dict[str, Tensor], model: nn.Module) -> None:
    """Whole tensors, as state_dict() names them, into a model that is sharded; strictly."""
    model.load_state_dict({name: _as(x, source[name]) for name, x in model.state_dict().items()})


def tied(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gathered weights, with one tensor for the names that share one in the model: it is saved once."""
    first = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(x), name)
    own = {name: first[id(x)] for name, x in model.named_parameters(remove_duplicate=False)}
    return {name: state[own.get(name, name)] for name in state}


def load_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """An optimizer's state, in pieces or whole, for the weights it has; none for those without.

    A whole one has the weights in the order of the optimizer's groups. What groups are told, rates above all,
    is left as it is.
    """
    optimizer.state.clear()
    if not is_sharded(checkpoint):
        saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)["state"]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for i, state in saved.items():
            like = weights[i]
            optimizer.state[like] = {k: _as(like, x) if x.dim() else x for k, x in state.items()}
        return
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for key in sorted(_names(checkpoint / MOMENTS)):
        name, _, moment = key.removeprefix("optimizer.state.").rpartition(".")
        if key.startswith("optimizer.state.") and name in weights:
            like = weights[name]
            found[key] = torch.zeros(()) if moment == "step" else torch.zeros_like(like.detach())
            optimizer.state[like][moment] = found[key]
    _load(found, checkpoint / MOMENTS)


def begin_with(moments: Mapping[str, Mapping[str, Tensor]], model: nn.Module, optimizer: Optimizer) -> None:
    """Gives an optimizer that has not stepped a state, by the names of parameters: whole tensors, to a model
    that is sharded or not. Its groups stay as they are."""
    own = {id(x): name for name, x in model.named_parameters()}
    found = optimizer.state_dict()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for i, weight in enumerate(weights):
        state = moments.get(own.get(id(weight), ""), {})
        made = {key: _as(weight, x.clone()) if x.dim() else x.clone() for key, x in state.items()}
        found["state"] |= {i: made} if made else {}
    optimizer.load_state_dict(found)


def _as(like: Tensor, whole: Tensor) -> Tensor:
    """A tensor placed as another is; each process has all of it."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _names(folder: Path) -> set[str]:
    return set(Pieces(folder).read_metadata().state_dict_metadata)


def _load(tensors: dict[str, Tensor], folder: Path) -> None:
    alone = not distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")  # said of `alone`
        dcp.load(tensors, storage_reader=Pieces(folder), no_dist=alone)
