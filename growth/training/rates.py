"""Learning-rate groups: parameters, by patterns of their names, that train at a share of the rate."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.record import RECORD


def with_rates(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    rates: Mapping[str, float],
    keep_decay: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer, which has not stepped and has no schedule yet, with its groups parted by their rates.

    rates: a pattern of names ("*.mixer.*", * and ? as in a shell) to the share of the rate; of patterns that
    a parameter matches by any of its names the first counts, and 1 where there is none. Groups keep all else,
    such as their weight decay, which AdamW multiplies by the group's rate; with keep_decay what a step decays
    stays, and the coefficient is divided by the share. Schedules, which multiply a group's own rate, act on
    each. Groups get `param_names`, by which their state is read again. For any Trainer:

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        Trainer(model, args, optimizers=(with_rates(optimizer, model, {"*.mlp.*": 0.3}), None), ...)

    Raises Refusal where a share is not above 0 and finite, and where a pattern matches nothing.
    """
    shares = shares_of(model, rates)
    names = {id(x): name for name, x in reversed([*model.named_parameters(remove_duplicate=False)])}
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in group["params"]:
            parts.setdefault(shares.get(id(parameter), 1.0), []).append(parameter)
        for share, parameters in parts.items():
            own = {"params": parameters, "lr": share * group["lr"]}
            if keep_decay and "weight_decay" in group:
                own["weight_decay"] = group["weight_decay"] / share
            if all(id(x) in names for x in parameters):
                own["param_names"] = [names[id(x)] for x in parameters]
            groups += [group | own] if parameters else []
    # The first group's rate is the one that is shown.
    optimizer.param_groups[:] = sorted(groups, key=lambda group: -group["lr"])
    return optimizer


def shares_of(model: nn.Module, rates: Mapping[str, float]) -> dict[int, float]:
    """The share of each parameter that a pattern matches, by its id: one parameter may have two names."""
    found: dict[int, float] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern, share in rates.items():
        if not 0 < share < float("inf"):
            remedy = "freeze what is not to train at all"
            raise refuse(f"rates {pattern}", "a share of the rate, above 0 and finite", share, remedy)
        chosen = [x for name, x in parameters.items() if fnmatchcase(name, pattern)]
        if not chosen:
            remedy = f"it has {', '.join(parameters)}"
            raise refuse(f"rates {pattern}", "a name of the model's parameters", "none of them", remedy)
        for parameter in chosen:
            found.setdefault(id(parameter), share)
    return found


def copied(folder: str | Path) -> list[str]:
    """The tensors of a checkpoint that its growth.json says were copied as they were."""
    rows = Checkpoint(folder).record().get("tensors", [])
    names = [row["name"] for row in rows if row.get("origin") == "copied"]
    if not names:
        expected = f"a checkpoint with copied tensors in its {RECORD}, as growth transfer writes it"
        raise refuse(f"copied-rate {folder}", expected, "none", "train without --copied-rate")
    return names
