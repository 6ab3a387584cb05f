"""bert2BERT's first stage: sub-models of the bottom layers train first.  Chen et al., ACL 2022, algorithm 1.

    each step   k uniform from {l_b, 2 l_b, ..., L}: the model is its bottom k layers and its head
                the top l_b of these, and the head, are updated
    then        all of it trains

What lies below the top l_b layers is held still for the step, the embeddings too, but what a head shares with
them. The paper: l_b = 3, and 5 epochs of the first stage, of BERT-Base from BERT-Small; 20 save less.
"""

import random

from transformers.trainer_callback import ExportableState

from growth.errors import refuse
from growth.training.skipping import Skipping


class SubmodelStage(Skipping, ExportableState):
    """Trains bottom sub-models by `layers` more layers each, for `steps` steps or `epochs` epochs, of a model
    of any family; of the two stacks of a T5 as many groups of layers, as far as it has them.

    A callback for any `transformers.Trainer`, with a seed as LayerDropping has it; a resumed run equals an
    unbroken one. Under DDP set `ddp_find_unused_parameters=True`.

    Raises Refusal where not one of steps and epochs is given, where a length is none, and, at the start of
    training, where the model has no more than `layers` layers.
    """

    def __init__(
        self, layers: int = 3, steps: int | None = None, epochs: float | None = None, seed: int | None = None
    ):
        if layers < 1:
            raise refuse("submodel stage", "at least 1 layer more each", layers, "3 are published")
        if (steps is None) == (epochs is None):
            got = "neither" if steps is None else "both"
            raise refuse("submodel stage", "its length in steps or in epochs", got, "give one of them")
        if not ((steps or 0) >= 1 or (epochs or 0) > 0):
            got = epochs if steps is None else steps
            raise refuse("submodel stage", "a length of at least a step", got, "leave it out")
        super().__init__()
        self.layers, self.steps, self.epochs, self.seed = layers, steps, epochs, seed

    def state(self) -> dict:
        given = {"layers": self.layers, "steps": self.steps, "epochs": self.epochs, "seed": self.seed}
        return {"args": given, "attributes": {}}

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        super().on_train_begin(args, state, control, model=model)
        if (most := max(map(len, self.stacks.values()))) <= self.layers:
            self.on_train_end(args, state, control)
            raise refuse("submodel stage", f"fewer than the model's {most} layers", self.layers, "take fewer")

    def on_step_begin(self, args, state, control, **kwargs):
        if self._over(state):
            self.skipped = self.held = frozenset()
            return
        draw = random.Random(f"{args.seed if self.seed is None else self.seed} {state.global_step}")
        groups = draw.randint(1, -(-max(map(len, self.stacks.values())) // self.layers))
        skipped, held = set(), set()
        for names in self.stacks.values():
            top = min(len(names), groups * self.layers)
            skipped |= {*names[top:]}
            held |= {*names[: max(0, top - self.layers)]}
        self.skipped, self.held = frozenset(skipped), frozenset(held)

    def _over(self, state) -> bool:
        if self.epochs is not None:
            return (state.epoch or 0) >= self.epochs
        return state.global_step >= self.steps
