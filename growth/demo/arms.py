"""The ways from a trained source to a trained target: every method, every transfer, and what adds to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from growth.methods import METHODS
from growth.training.callbacks import LayerDropping, SubmodelStage, TokenDropping

SCRATCH = "scratch"


@dataclass(frozen=True)
class Arm:
    """How a start is made of a source, and how it trains.

    name       of the arm; group: "growth" or "transfer"
    method     of growing, with its options; else mixers: what growth.transfer is told
    fitted     to the attention, first: new mixers in "steps", or their last projection "solved" alone
    longer     how many times the family's steps that takes
    early      the rate of its source has not fallen: it stayed where it was, for as many steps
    twin       of a transfer: the arm whose baseline is its own, too; None: it has one
    carries    training goes on with its source's optimizer, grown along
    callbacks  of a run of so many steps
    """

    name: str
    group: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    mixers: Mapping[str, Any] | None = None
    fitted: str | None = None
    longer: int = 1
    early: bool = False
    twin: str | None = None
    carries: bool = False
    callbacks: Callable[[int], Sequence[TrainerCallback]] = lambda steps: ()

    @property
    def baseline(self) -> str:
        """The fresh model that it is measured against: one for all that are grown, a twin of a transfer."""
        return SCRATCH if self.group == "growth" else f"{SCRATCH} of {self.twin or self.name}"

    @property
    def source(self) -> str:
        return "early source" if self.early else "source"


TRANSFERS: dict[str, dict[str, Any]] = {
    "retnet": {"mixers": "retention"},
    "retnet-learned": {"mixers": "retention", "decays": "learned"},
    "mamba": {"mixers": "mamba"},
    "mamba2": {"mixers": "mamba2"},
    "hybrid": {"mixers": "retention", "keep_attention": [1]},
    "hybrid-learned": {"mixers": "retention", "decays": "learned", "keep_attention": [1]},
}


def _grown() -> list[Arm]:
    arms = [Arm(name, "growth", name) for name in METHODS]
    arms.append(Arm("lemon-carried", "growth", "lemon", {"noise": 2.0}, carries=True))
    arms.append(Arm("lemon-early", "growth", "lemon", {"noise": 2.0}, early=True, carries=True))
    combined: dict[str, Callable[[int], Sequence[TrainerCallback]]] = {
        "layers dropped": lambda steps: [LayerDropping(0.1)],
        "tokens dropped": lambda steps: [TokenDropping(0.15)],
        "in stages": lambda steps: [SubmodelStage(1, steps=max(1, steps // 8))],
    }
    arms += [Arm(f"ligo, {name}", "growth", "ligo", callbacks=made) for name, made in combined.items()]
    return arms


def _transferred() -> list[Arm]:
    arms = []
    for name, told in TRANSFERS.items():
        arms.append(Arm(name, "transfer", mixers=told, fitted="steps"))
        longer = f"{name}, aligned longer"
        arms.append(Arm(longer, "transfer", mixers=told, twin=name, fitted="steps", longer=4))
        arms.append(Arm(f"{name}, solved", "transfer", mixers=told, twin=name, fitted="solved"))
        arms.append(Arm(f"{name}, unaligned", "transfer", mixers=told, twin=name))
        arms.append(Arm(f"{name}-early", "transfer", mixers=told, twin=name, fitted="steps", early=True))
    return arms


ARMS = {arm.name: arm for arm in (*_grown(), *_transferred())}
