"""Train the new weights first, the transferred ones when the loss stops improving.  XATL, arXiv 2404.02684.

    L_k        mean training loss of window k of the steps
    improved   (L_{k-1} - L_k) / L_{k-1}
    unfreeze   once `improved < threshold` held for `patience` windows, in all ("total", as in XATL's code) or
               one after the other ("row")

XATL's two settings: 1 % with patience 1, and 0.5 % with patience 2, over windows of 5000 steps. The
transferred weights then are optimizer groups of their own, whose rate rises to the current main rate in
`warmup` steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.record import RECORD

Counts = Literal["total", "row"]


@dataclass
class Plateau:
    """The loss-improvement threshold of the module docstring, fed one window's mean loss at a time."""

    threshold: float = 0.01
    patience: int = 1
    counts: Counts = "total"
    last: float | None = None
    poor: int = 0

    def reached(self, loss: float) -> bool:
        """Takes the next window's mean loss; true once the patience is used up."""
        if self.last is not None and (self.last - loss) / self.last < self.threshold:
            self.poor += 1
        elif self.counts == "row":
            self.poor = 0
        self.last = loss
        return self.poor >= self.patience


class UnfreezeOnPlateau(TrainerCallback, ExportableState):
    """Keeps the parameters named `frozen` as they are until the loss is on its plateau, then trains them too.

    A callback for any `transformers.Trainer`; a window is what the Trainer logs (`logging_steps` steps).
    Under DDP set `ddp_find_unused_parameters=True`: frozen parameters get no gradient. An interrupted run
    resumes exactly: the state is in trainer_state.json, and the optimizer's groups are the Trainer's, parted
    only while it steps.

    `unfrozen_at` is the number of steps after which they train, None before that. Raises Refusal where a name
    is not a parameter of the model, and where no other parameter is left to train.
    """

    def __init__(
        self,
        frozen: Sequence[str],
        threshold: float = 0.01,
        patience: int = 1,
        warmup: int = 0,
        counts: Counts = "total",
    ):
        if counts not in get_args(Counts):
            raise refuse("patience-counts", "total or row", counts, "choose one of these")
        self.frozen, self.warmup = list(frozen), warmup
        self.plateau = Plateau(threshold, patience, counts)
        self.unfrozen_at: int | None = None
        self._parameters: list[nn.Parameter] = []
        self._groups: list[dict] | None = None

    def state(self) -> dict:
        plateau = self.plateau
        return {
            "args": {
                "frozen": self.frozen,
                "threshold": plateau.threshold,
                "patience": plateau.patience,
                "warmup": self.warmup,
                "counts": plateau.counts,
            },
            "attributes": {"progress": [plateau.last, plateau.poor, self.unfrozen_at]},
        }

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        if state.global_step and (saved := state.stateful_callbacks.get(type(self).__name__)):
            self.plateau.last, self.plateau.poor, self.unfrozen_at = saved["attributes"]["progress"]
        self._parameters = named_parameters(model, self.frozen)
        self._train(self.unfrozen_at is not None)

    def on_log(self, args, state, control, *, logs, **kwargs):
        if self.unfrozen_at is None and "loss" in logs and self.plateau.reached(logs["loss"]):
            self.unfrozen_at = state.global_step
            self._train(True)

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        if self.unfrozen_at is None or state.global_step - self.unfrozen_at >= self.warmup:
            return
        share = (state.global_step - self.unfrozen_at + 1) / self.warmup
        self._groups = list(optimizer.param_groups)
        optimizer.param_groups[:] = _parted(self._groups, {id(p) for p in self._parameters}, share)

    def on_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        if self._groups is not None:
            optimizer.param_groups[:] = self._groups
            self._groups = None

    def on_train_end(self, args, state, control, **kwargs):
        self._train(True)

    def _train(self, wanted: bool) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(wanted)


def transferred(folder: str | Path) -> list[str]:
    """The tensors of a checkpoint that its growth.json asks to hold still at first."""
    rows = Checkpoint(folder).record().get("tensors", [])
    names = [row["name"] for row in rows if row["freeze"]]
    if not names:
        expected = f"a checkpoint whose {RECORD} asks for it, as growth transfer and llama-pro write it"
        raise refuse(f"freeze {folder}", expected, "none to hold still", "train without --freeze")
    return names


def named_parameters(model: nn.Module, names: list[str]) -> list[nn.Parameter]:
    """The parameters of those names, or a refusal where one is unknown or no other is left to train."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in names if name not in parameters]:
        raise refuse(
            "freeze", "names of the model's parameters", ", ".join(unknown), f"it has {', '.join(parameters)}"
        )
    chosen = [parameters[name] for name in names]
    if {id(p) for p in parameters.values()} <= {id(p) for p in chosen}:
        raise refuse(
            "freeze", "at least one parameter left to train", f"all {len(parameters)} of them", "freeze fewer"
        )
    return chosen


def _parted(groups: list[dict], chosen: set[int], share: float) -> list[dict]:
    """The groups without the chosen parameters, then those in groups of their own at `share` of the rate."""
    main = [g | {"params": [p for p in g["params"] if id(p) not in chosen]} for g in groups]
    own = [g | {"params": [p for p in g["params"] if id(p) in chosen], "lr": share * g["lr"]} for g in groups]
    return [g for g in main + own if g["params"]]
