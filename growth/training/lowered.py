"""A run whose loss was no number goes on at a lower rate.

    settings.json      "not_finite": the step that stopped it; "lowered": each rate before, and its last step

Of one that stopped otherwise the rate stays what it was.
"""

import sys
from pathlib import Path

from growth.jsonfile import read_object, rewrite

STOPPED, LOWERED, RATE = "not_finite", "lowered", "learning_rate"


def note_stop(record: Path, step: int) -> None:
    """Enter that the loss of this step was no number."""
    rewrite(record, read_object(record) | {STOPPED: step})


def is_lowered(before: dict, now: dict, changed: list[str]) -> bool:
    """Whether the rate alone is another, a lower one, after a loss that was no number."""
    return STOPPED in before and changed == [RATE] and now[RATE] < before[RATE]


def lowered(record: Path, settings: dict, checkpoint: Path | None = None) -> dict:
    """What the record has of rates before that of `settings`, with which the run goes on from that
    checkpoint; a lower one is entered, and said."""
    before, now = read_object(record), settings[RATE]
    if now != before[RATE]:
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        told = f"goes on after step {step} at a learning rate of {now:g}, not {before[RATE]:g}"
        print(f"{record.parent}: {told}", file=sys.stderr)
        rates = [*before.get(LOWERED, ()), {RATE: before[RATE], "last_step": step}]
        before = {key: x for key, x in before.items() if key != STOPPED} | {RATE: now, LOWERED: rates}
        rewrite(record, before)
    return {LOWERED: before[LOWERED]} if LOWERED in before else {}
