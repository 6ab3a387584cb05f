"""What growing, transferring or shrinking a checkpoint takes: bytes, memory, seconds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from growth.costs.machines import Machine
from growth.expand import Copy
from growth.plan import Plan, Source, make_room
from growth.writing import SHARD_BYTES, layout, planned


@dataclass(frozen=True)
class Job:
    """read_to_plan, hashed, used: bytes of tensors that are read to plan, for the fingerprint, for the rows.
    writes: bytes of the weights' files. memory: the most bytes that a row holds. copied, expanded: numbers
    that are written; drawn: at random, of fresh mixers what is kept of them. uncounted: what it takes
    besides, such as learning, which none of these has in it."""

    read_to_plan: int
    hashed: int
    used: int
    writes: int
    memory: int
    copied: int
    expanded: int
    drawn: int
    uncounted: str = ""

    @property
    def reads(self) -> int:
        return self.read_to_plan + self.hashed + self.used

    def seconds(self, machine: Machine) -> float:
        """Of what comes after planning: one after the other, in one thread."""
        cached = min(self.writes, machine.room)
        moved = self.hashed / machine.hashed + self.used / machine.read
        moved += cached / machine.cached + (self.writes - cached) / machine.written
        made = self.copied / machine.copied + self.expanded / machine.expanded
        return moved + made + self.drawn / machine.drawn


def job_of(source: Source, plan: Plan, shard_bytes: int = SHARD_BYTES, uncounted: str = "") -> Job:
    """What carrying out the plan takes; what planning has read of the source is in it."""
    size = source.checkpoint.bytes
    heads = sum(len(layout(rows)[0]) for rows in planned(plan.rows, shard_bytes).values())
    copied = sum(math.prod(row.shape) for row in plan.rows if row.origin == "copied")
    return Job(
        source.checkpoint.taken,
        sum(map(size, source.checkpoint.names)),
        sum(map(size, read_for(source, plan))),
        plan.bytes + heads,
        plan.memory,
        copied,
        plan.parameters - copied,
        sum(row.drawn for row in plan.rows),
        uncounted,
    )


def read_for(source: Source, plan: Plan) -> Iterator[str]:
    """The tensors on disk that making the rows reads, in turn: Source.raw keeps those of several weights."""
    several = {source.on_disk[name] for name, (entry, _) in source.table.items() if len(entry.weights) > 1}
    kept: dict[str, None] = {}
    for row in plan.rows:
        for name in row.sources:
            if name in several and not isinstance(row.recipe, Copy):
                if name in kept:
                    continue
                make_room(kept)
                kept[name] = None
            yield name
