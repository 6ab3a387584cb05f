"""Learning-rate schedules: how large a part of the peak rate each step gets. Functions fit for LambdaLR."""

import math
from collections.abc import Callable

from growth.errors import refuse

Schedule = Callable[[int], float]


def cosine(steps: int, *, warmup: int, floor: float = 0.1) -> Schedule:
    """A linear rise to 1, then half a cosine down to `floor`, where it stays.

        step < warmup:   (step + 1) / warmup
        else:            floor + (1 - floor) (1 + cos(pi x)) / 2
        x = min(1, (step - warmup) / (steps - warmup))

    Step counts from 0. Raises Refusal where 0 <= warmup < steps does not hold.
    """
    if not 0 <= warmup < steps:
        raise refuse("warmup", f"at least 0, and less than the {steps} steps", warmup, "choose a shorter one")

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        x = min(1.0, (step - warmup) / (steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2

    return rate


def constant(steps: int, *, warmup: int) -> Schedule:
    """A linear rise to 1, as cosine's, and no fall: of a run that goes on, grown or not, where it ends.

    Raises Refusal where 0 <= warmup < steps does not hold.
    """
    return cosine(steps, warmup=warmup, floor=1.0)


def lemon(steps: int, *, warmup: int, floor: float = 0.1, share: float = 0.6) -> Schedule:
    """The same peak, a faster fall: a cosine that ends after `share` of the steps, then `floor`.

    A grown model starts where a fresh one arrives late, so it needs the high rate for a shorter time; a lower
    peak ends higher (Wang et al., ICLR 2024: 132k of 220k steps for BERT, 130 of 300 epochs for ViT).
    Raises Refusal where 0 <= warmup < share * steps and share <= 1 do not hold.
    """
    if not 0 < share <= 1:
        raise refuse("decay", "a share of the steps, above 0 and at most 1", share, "choose one in between")
    return cosine(round(share * steps), warmup=warmup, floor=floor)
