"""Processes that run one verb together, as torchrun and accelerate start them: where one stops, all do."""

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from growth.errors import Refusal, reason, refuse

_met = False  # whether the processes of the verb that runs now have agreed to begin


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a verb: what stops one process before `agree` stops all of them there, with its words."""
    global _met
    _met = False
    try:
        yield
    except Exception as error:
        if not _met and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            agree(error)
        raise


def agree(error: Exception | None = None) -> None:
    """Every process comes here once, before the work; the first reason of any not to begin is all's."""
    global _met
    _met = True
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    PartialState(cpu=not torch.accelerator.is_available())
    said = gather_object([error and reason(error)])
    for process, why in enumerate(said):
        if why and not error:
            raise Refusal(f"process {process} of {len(said)}: {why}")


def refuse_lost(error: BaseException, remedy: str) -> Refusal | None:
    """The refusal of what a process meets when another has ended; None where `error` is something else."""
    said = str(error)
    lost = isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in said for word in ("gloo", "Gloo", "NCCL"))
    )
    if not lost:
        return None
    N = PartialState().num_processes
    return refuse("processes", f"all {N} to the end", "one that is gone", remedy)
