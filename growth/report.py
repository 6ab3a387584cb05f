"""What one call of growth did."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth.plan import Plan

if TYPE_CHECKING:
    from growth.costs.told import Costs


@dataclass(frozen=True)
class Report:
    """The result of growing or transferring a checkpoint.

    lossless: does the new model promise the source's logits. seconds, flops: what making it took; flops
    counts the multiplications and additions of matrix products (2 per pair), training steps of a learned
    operator included. target is None for a dry run. parameters: of the source and of the target. notes:
    what is lost, and what the target lacks of the source's settings. sizes: those that growing
    changed, such as hidden-size, of the source and of the target. details: what growth.json has of learning,
    besides; lines: the same for people. costs: of a dry run, what making and training the target would take.
    """

    source: Path
    target: Path | None
    method: str
    lossless: bool
    seconds: float
    flops: int
    parameters: tuple[int, int]
    plan: Plan
    notes: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    costs: "Costs | None" = None

    def json(self) -> dict:
        """All of it, as JSON has it."""
        told = {
            x.name: getattr(self, x.name)
            for x in fields(self)
            if x.name not in ("plan", "details", "lines", "costs")
        }
        told |= {"source": str(self.source), "target": None if self.target is None else str(self.target)}
        told |= {"costs": self.costs.json()} if self.costs else {}
        return told | self.details | {"bytes": self.plan.bytes, "memory": self.plan.memory} | self.plan.json()

    def __str__(self) -> str:
        origins = ", ".join(f"{count} {origin}" for origin, count in self.plan.origins().items())
        promise = "the same logits as the source" if self.lossless else "other logits than the source"
        where = self.target or "nothing (dry run)"
        sizes = "".join(f"{name} {old} -> {new}, " for name, (old, new) in self.sizes.items())
        return (
            f"{self.source} -> {where} by {self.method}: {sizes}"
            f"{self.parameters[0]:,} -> {self.parameters[1]:,} parameters; tensors: {origins}; "
            f"{len(self.plan.dropped)} dropped; {promise}; {self.seconds:.1f} s"
        )
