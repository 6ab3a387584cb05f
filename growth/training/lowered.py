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


def enter_rate(record: Path, now: float, step: int) -> list[dict]:
    """The rates before this one, each with its last step. A new one is entered in the record, and said."""
    before = read_object(record)
    earlier, was = before.get(LOWERED, []), before[RATE]
    if now != was:
        told = f"goes on after step {step} at a learning rate of {now:g}, not {was:g}"
        print(f"{record.parent}: {told}", file=sys.stderr)
        earlier = [*earlier, {RATE: was, "last_step": step}]
    if STOPPED in before:  # it may be stopped otherwise now
        kept = {key: x for key, x in before.items() if key != STOPPED}
        rewrite(record, kept | {RATE: now, LOWERED: earlier})
    return earlier
