"""Does memory hold what a step makes, so that nothing has to be made twice?"""

from pathlib import Path

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks

from growth.learned.expansion import Expansion
from growth.training.examples import Examples
from growth.training.flops import Batch

CGROUP = Path("/sys/fs/cgroup")


def free(device: torch.device) -> int:
    """Bytes that may still be taken there; on a CPU, of the machine or of the container around us."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [psutil.virtual_memory().available]
    most, now = (CGROUP / f"memory.{name}" for name in ("max", "current"))
    if most.exists() and (limit := most.read_text().strip()) != "max":
        left.append(int(limit) - int(now.read_text()))
    return min(left)


def kept(expansion: Expansion, batch: Batch) -> int:
    """Bytes that a forward holds for its backward where that makes nothing again."""
    held: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    remakes, expansion.remakes = expansion.remakes, False
    with torch.random.fork_rng(), saved_tensors_hooks(pack, lambda x: x):
        outputs = expansion(**batch)
    expansion.remakes = remakes
    del outputs  # until here all lives that was counted, so that no address came twice
    drawn = sum(x.nbytes for x in expansion.operator.drawn.values())
    expansion.operator.forget()
    return drawn + sum(held.values())


def fits(expansion: Expansion, examples: Examples, batch_size: int, device: torch.device) -> bool:
    """Is there twice the memory that a step holds between forward and backward? The other half is for the
    gradients of what the backward is at.

    From what one example holds and two do; where the large weights alone are too much, nothing is run.
    """
    room = free(device) // 2
    if 4 * expansion.target.architecture.parameters > room:
        return False
    one, two = (
        kept(expansion, {name: x.to(device) for name, x in examples.batch([0] * B).items()}) for B in (1, 2)
    )
    return one + (batch_size - 1) * (two - one) <= room
