"""Progressive layer dropping.  Zhang & He, NeurIPS 2020, arXiv 2010.13369, algorithm 1.

    theta(t) = (1 - theta_min) exp(-gamma t) + theta_min      gamma = 100 / T, t of T steps
    p_l(t)   = 1 - (l / L) (1 - theta(t))                     l = 0 .. L-1, counted from the input

Layer l is kept with probability p_l, and what it adds is divided by p_l, so that its expectation is the
layer's own; else it is skipped. theta_min is 1 less the `rate`. LiGO trains grown models so at a rate of 0.1
(arXiv 2303.00980). The paper divides the two halves of a pre-norm block each; here a block is one step of the
stream, which any kind of block is.
"""

import math
import random

from transformers.trainer_callback import ExportableState

from growth.errors import refuse
from growth.training.skipping import Skipping

GAMMA = 100


class LayerDropping(Skipping, ExportableState):
    """Drops layers of a model of any family, of the two stacks of a T5 each by its own depth.

    A callback for any `transformers.Trainer`. Which layers a step drops follows from `seed` (default: the
    Trainer's) and the step's number: a resumed run drops what an unbroken one does, and all processes the
    same. Under DDP set `ddp_find_unused_parameters=True`.

    Raises Refusal where the rate is not in [0, 1), and at the start of training where no family knows the
    model.
    """

    def __init__(self, rate: float = 0.1, seed: int | None = None):
        if not 0 <= rate < 1:
            raise refuse("drop-layers", "a rate of at least 0 and below 1", rate, "0.1 is a common one")
        super().__init__()
        self.rate, self.seed = rate, seed

    def state(self) -> dict:
        return {"args": {"rate": self.rate, "seed": self.seed}, "attributes": {}}

    def theta(self, step: int, steps: int) -> float:
        """The share of layers that the depth's end keeps, after `step` steps of `steps`."""
        return self.rate * math.exp(-GAMMA * step / steps) + 1 - self.rate

    def on_step_begin(self, args, state, control, **kwargs):
        theta = self.theta(state.global_step, state.max_steps)
        draw = random.Random(f"{args.seed if self.seed is None else self.seed} {state.global_step}")
        kept = {
            name: 1 - i / len(layers) * (1 - theta)
            for layers in self.stacks.values()
            for i, name in enumerate(layers)
        }
        self.skipped = frozenset(name for name, share in kept.items() if draw.random() >= share)
        self.scales = {name: 1 / share for name, share in kept.items()}
