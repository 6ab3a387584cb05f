"""What `growth train` is asked for: options that do not fit are refused before anything is read."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any, get_args

import torch
from transformers.integrations import integration_utils

from growth.errors import reason, refuse, refuse_odd_seed
from growth.methods.option import refuse_other_type
from growth.training.distil import refuse_odd_mix
from growth.training.freeze import Counts

LEAST = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "eval_every": 1,
    "save_every": 0,
    "warm_new": 0,
    "window": 1,
    "patience": 1,
}
CHOICES = {"schedule": ("cosine", "lemon", "constant"), "patience_counts": get_args(Counts)}


def typed(verb: Callable) -> Callable:
    """The verb, with a Refusal where an argument is not of the plain type that its signature names."""
    told = signature(verb)

    @wraps(verb)
    def checked(*given: Any, **named: Any) -> Any:
        for name, got in told.bind(*given, **named).arguments.items():
            refuse_other_type(_spoken(name), told.parameters[name].annotation, got)
        return verb(*given, **named)

    return checked


def refuse_odd_options(given: dict) -> None:
    """Raises Refusal where one of the options, by their names in Python, is none or does not fit another."""
    refuse_odd_seed(given["seed"])
    for name, least in LEAST.items():
        if given[name] < least:
            raise refuse(_spoken(name), f"at least {least}", given[name], "choose a larger number")
    if not 0 < given["learning_rate"] < math.inf:
        raise refuse("learning rate", "above 0, and finite", given["learning_rate"], "3e-4 is a common one")
    if not 0 <= given["weight_decay"] < math.inf:
        raise refuse("weight decay", "at least 0, and finite", given["weight_decay"], "0.1 is a common one")
    if not math.isfinite(given["threshold"]):
        raise refuse("threshold", "a finite improvement", given["threshold"], "0.01 is the usual one")
    for name, choices in CHOICES.items():
        if given[name] not in choices:
            raise refuse(_spoken(name), " or ".join(choices), given[name], "choose one of these")
    if (given["freeze"], given["unfreeze"]) not in (
        (None, None),
        ("transferred", None),
        ("transferred", "plateau"),
    ):
        raise refuse(
            "freeze, unfreeze",
            "nothing, or transferred with or without plateau",
            f"{given['freeze']}, {given['unfreeze']}",
            "pass --freeze transferred --unfreeze plateau",
        )
    if given["scaled_rates"] and given["copied_rate"] is not None:
        got, remedy = "both", "leave one out"
        raise refuse("scaled-rates, copied-rate", "one of them, or neither", got, remedy)
    share = given["copied_rate"]
    if share is not None and not 0 < share <= 1:
        remedy = "pass --freeze transferred to hold what was copied still"
        raise refuse("copied-rate", "a share of the rate, above 0 and at most 1", share, remedy)
    if given["teacher"] is None:
        for name, usual in (("teacher_weight", 0.5), ("temperature", 1.0)):
            if given[name] != usual:
                remedy = "pass --teacher, or leave it out"
                raise refuse(_spoken(name), "none without a teacher", given[name], remedy)
    refuse_odd_mix(given["teacher_weight"], given["temperature"])
    if given["fp16"] and given["bf16"]:
        raise refuse("bf16, fp16", "one of them, or neither", "both", "pass --bf16 where the GPU has it")
    if given["fp16"] and not torch.accelerator.is_available():
        expected = "a GPU, for torch scales no loss elsewhere and small gradients would be 0"
        raise refuse("fp16", expected, "a CPU alone", "pass --bf16")


def refuse_unknown_reporters(names: Sequence[str]) -> None:
    """Raises Refusal where the Trainer has no integration of such a name, or its package is not installed."""
    if not isinstance(names, Sequence):
        raise refuse("report-to", "a list of names", repr(names), "such as ['tensorboard']")
    for name in names:
        if name not in (known := integration_utils.INTEGRATION_TO_CALLBACK):
            raise refuse("report-to", f"one of {', '.join(sorted(known))}", name, "choose one of these")
        try:
            known[name]()
        except Exception as error:  # each says in its own way what it misses
            raise refuse(
                f"report-to {name}", "its package", reason(error), "install it, or leave it out"
            ) from error


def _spoken(name: str) -> str:
    return name.replace("_", " ") if name != "patience_counts" else "patience-counts"
