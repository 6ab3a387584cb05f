"""What a transfer does with data: it fits the mixers, and chooses the layers that keep their attention."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth.errors import refuse
from growth.learned.fit import examples_for
from growth.training.data import Data
from growth.training.examples import Examples
from growth.transferring.align import Aligning, Alignment, kept_in, layer_line
from growth.transferring.one_mixer import peak_memory
from growth.transferring.planned import Start, of_mixer
from growth.transferring.restoration import HELD_OUT, Restored, best, table
from growth.transferring.starting import Starting
from lcikernels.models.fields import ATTENTION

if TYPE_CHECKING:
    from growth.costs.aligning import Aligned

ALIGN = 100  # steps with data, where nobody says how many


def count_of(keep_attention: str | Sequence[int]) -> int | None:
    """K of "auto:K"; None for layers by their numbers."""
    if not isinstance(keep_attention, str):
        return None
    if not (found := re.fullmatch(r"auto:(\d+)", keep_attention)):
        expected = "layer numbers such as 1,11, or auto:2 for the two that data choose"
        raise refuse("keep-attention", expected, repr(keep_attention), "choose one of these")
    return int(found[1])


@dataclass(frozen=True)
class Fitted:
    """What fitting did, for the report: operations, what growth.json holds of it, and lines for people."""

    flops: int = 0
    json: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    kept: tuple[int, ...] = ()


def fitting_of(
    starting: Starting,
    align: int | Alignment | None,
    data: Data | None,
    keep: int | None,
    field: str = "text",
) -> "Fitting | None":
    """What `transfer` is asked for, None where it is asked for nothing that takes data.

    Raises Refusal where data lack, do not fit the source or fill no batch, where no layer has use for them,
    or `keep` layers cannot be chosen.
    """
    if align is None:
        align = ALIGN if data is not None and starting.new else 0
    how = align if isinstance(align, Alignment) else Alignment(align)
    if data is None and not how.steps and keep is None:
        return None
    if not starting.new:
        flag, got = ("align", how.steps) if how.steps else ("data", "some")
        raise refuse(flag, "none, for no layer's mixer changes", got, "leave it out, or choose other mixers")
    most = len(restorable(starting))
    if keep is not None and not 1 <= keep <= most:
        expected, remedy = f"1 to {most} layers that keep their attention", "choose a number in between"
        raise refuse("keep-attention", expected, f"auto:{keep}", remedy)
    for_what = "align" if how.steps else "keep-attention auto"
    windows = examples_for(
        starting.source,
        data,
        how.batch_size,
        how.sequence_length,
        for_what,
        field,
        windows=how.batches * how.batch_size + (0 if keep is None else HELD_OUT),
        seed=starting.seed,
    )
    if keep is None:
        return Fitting(how, windows)
    if len(windows) < (least := how.batch_size + HELD_OUT):
        expected = f"{least} windows of {windows.length} tokens, a batch and {HELD_OUT} to score layers on"
        raise refuse("data", expected, len(windows), "give more text, or a shorter sequence length")
    return Fitting(how, *windows.hold_out(HELD_OUT, starting.seed), keep)


@dataclass(frozen=True)
class Fitting:
    """Mixers to be fitted to windows; and `keep` layers, scored on others, that keep their attention."""

    how: Alignment
    windows: Examples
    held_out: Examples | None = None
    keep: int = 0

    def such(self, starting: Starting) -> Starting:
        """A model of the kind that comes out: with as many layers that keep their attention."""
        return starting.keeping(restorable(starting)[: self.keep])

    def bytes(self, starting: Starting) -> int:
        """What `run` leaves on disk, in float32."""
        model = starting.base.model.architecture
        weights = (x for layer in starting.new for x in model.at("", layer) if of_mixer(x.name))
        return sum(4 * math.prod(model.shape(x)) for x in weights)

    def on_paper(self, starting: Starting) -> "Aligned":
        """What `run` takes."""
        from growth.costs.aligning import alignment_of  # torch without numbers: seconds to import

        return alignment_of(self, starting)

    def run(self, starting: Starting, folder: Path) -> Fitted:
        """Fit every new mixer of `starting`; what they become lies in `folder`. Choose, where asked to."""
        restored = None
        if self.held_out is not None:
            ids = self.held_out.batch(range(len(self.held_out)))["input_ids"]
            restored = Restored(ids, restorable(starting))
        aligning = Aligning(starting, self.how, folder)
        windows = aligning.run(self.windows, restored)
        how = asdict(self.how) | {"sequence_length": self.windows.length, "windows": windows}
        found = {"align": how, "alignment": aligning.layers}
        lines, stages, kept = [layer_line(layer) for layer in aligning.layers], dict(aligning.stages), ()
        if farther := [
            str(layer["layer"]) for layer in aligning.layers if farther_than_before(layer["error"])
        ]:
            which = f"layer {farther[0]} is" if len(farther) == 1 else f"layers {', '.join(farther)} are"
            lines.append(f"{which} farther off than before the steps: more of them, such as 300, lead closer")
        if restored:
            scores = restored.scores(aligning.source)
            kept = tuple(best(scores, self.keep))
            stages["scores"] = restored.cost
            rows = table(scores, kept)
            found |= {"scores": rows, "scored": self.held_out.fingerprint()}
            lines += [score_line(row) for row in rows]
        flops = aligning.flops + (restored.cost.flops if restored else 0)
        found |= {"flops": flops, "stages": {name: asdict(cost) for name, cost in stages.items()}}
        found["peak_memory"] = peak_memory()
        return Fitted(flops, found, tuple(lines), kept)

    def starts(self, starting: Starting, folder: Path) -> dict[int, Start]:
        """Of the layers that `run` has fitted, or will have."""
        return kept_in(folder, starting, self.how)


def restorable(starting: Starting) -> list[int]:
    """The layers that may keep the source's attention."""
    return [layer for layer in starting.new if starting.old.pattern[layer] in ATTENTION]


def farther_than_before(error: dict[str, float]) -> bool:
    """Of a layer: did its steps, too few, undo what the start, or the solution, had reached?"""
    before = error.get("solved", error["started"])
    return error.get("aligned", before) > before


def score_line(row: dict[str, Any]) -> str:
    if row["layer"] is None:
        return f"no attention: KL {row['kl']:.4f}"
    kept = ", kept" if row["kept"] else ""
    return f"attention in layer {row['layer']}: KL {row['kl']:.4f}, lower by {row['lowers']:.4f}{kept}"
