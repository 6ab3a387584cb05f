"""What growing, transferring or shrinking a checkpoint takes: bytes, memory, seconds."""

import math
from dataclasses import dataclass

from growth.costs.machines import Machine
from growth.plan import Plan, Source
from growth.writing import SHARD_BYTES, layout, planned


@dataclass(frozen=True)
class Job:
    """reads: bytes, of every tensor once for the fingerprint, once for scores, and once for each row made of
    it. writes: bytes of the weights' files. memory: the most bytes that a row holds. copied, expanded:
    numbers. uncounted: what it takes besides, such as learning, which none of these has in it."""

    reads: int
    writes: int
    memory: int
    copied: int
    expanded: int
    uncounted: str = ""

    def seconds(self, machine: Machine) -> float:
        """One after the other, in one thread."""
        moved = self.reads / machine.read + self.writes / machine.written
        return moved + self.copied / machine.copied + self.expanded / machine.expanded


def job_of(
    source: Source, plan: Plan, shard_bytes: int = SHARD_BYTES, scored: bool = False, uncounted: str = ""
) -> Job:
    """What carrying out the plan takes. scored: does it look at all weights before it chooses some?"""
    size = {name: source.bytes(name) for name in source.on_disk.values()}
    used = sum(size[name] for row in plan.rows for name in row.sources)
    heads = sum(len(layout(rows)[0]) for rows in planned(plan.rows, shard_bytes).values())
    copied = sum(math.prod(row.shape) for row in plan.rows if row.origin == "copied")
    reads = (1 + scored) * sum(size.values()) + used
    return Job(reads, plan.bytes + heads, plan.memory, copied, plan.parameters - copied, uncounted)
