"""The callbacks that `growth train` has flags for, and what a record tells of any callback."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from growth.training.layer_dropping import LayerDropping
from growth.training.token_dropping import TokenDropping

DROPPING = {"drop_layers": LayerDropping, "drop_tokens": TokenDropping}


def dropping(given: Mapping[str, Any]) -> list[TrainerCallback]:
    """Those that are asked for, by their shares. Raises Refusal where one is no share."""
    return [kind(given[flag]) for flag, kind in DROPPING.items() if given.get(flag) is not None]


def asked_of(callback: TrainerCallback) -> dict[str, Any]:
    """A callback's name and what it was made with, as far as it tells."""
    args = callback.state()["args"] if isinstance(callback, ExportableState) else {}
    return {"name": type(callback).__name__, "args": json.loads(json.dumps(args))}  # as the file will have it
