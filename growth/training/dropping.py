"""The callbacks that `growth train` has flags for, and what a record tells of any callback."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from growth.errors import refuse
from growth.training.layer_dropping import LayerDropping
from growth.training.token_dropping import TokenDropping

DROPPING = {"drop_layers": LayerDropping, "drop_tokens": TokenDropping}


def dropping(given: Mapping[str, Any]) -> list[TrainerCallback]:
    """Those that are asked for, by their shares. Raises Refusal where one is no share."""
    return [kind(given[flag]) for flag, kind in DROPPING.items() if given.get(flag) is not None]


def refuse_pairs(callbacks: Sequence[TrainerCallback], adds: Sequence[type[TrainerCallback]]) -> None:
    """Raises Refusal where two callbacks of a kind keep a state, which the Trainer saves by the kind's name;
    adds: those that growth train has besides."""
    kinds = [type(callback) for callback in callbacks if isinstance(callback, ExportableState)]
    for kind in (all_of := [*kinds, *adds]):
        if all_of.count(kind) > 1:
            remedy = "leave one out, or what growth train adds by itself: masks, warm_new"
            raise refuse("callbacks", "one of a kind", f"several {kind.__name__}", remedy)


def asked_of(callback: TrainerCallback) -> dict[str, Any]:
    """A callback's name and what it was made with, as far as it tells."""
    args = callback.state()["args"] if isinstance(callback, ExportableState) else {}
    return {"name": type(callback).__name__, "args": json.loads(json.dumps(args))}  # as the file will have it
