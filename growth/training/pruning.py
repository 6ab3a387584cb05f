"""Alternate growth and pruning: neurons are taken out and grown anew in turns.  Evci et al., RigL, ICML 2020.

    every `every` steps, t < until, in each feed-forward block of F neurons, of which round(share F) are out:
    k       round(f(t) (F - round(share F))),   f(t) = swap / 2 (1 + cos(pi t / until))
    out     the k neurons of smallest |w_in| |w_out| go (at first: round(share F) of them)
    grown   of those that were out before, the k with the largest |dL/dw_out|, or k at random (SET)

RigL's equations with a neuron in the place of a weight. What is out is zero and stays zero, and is multiplied
all the same. A neuron that is grown gets fresh weights that write it and zeros that read it: the function is
unchanged. Which gradients these zeros get is seen by giving all that are out such weights for the step; those
of the ones not chosen are dropped, after they counted in the norm that gradients are clipped by.

Moments of what goes are 0. Of what is grown the first is 0 and the second the mean over the neurons that are
in, of the same tensor: from 0, with the step count of an old run, Adam's first step would be (1 - beta_1) /
sqrt(1 - beta_2) rates long, 3.2 at 0.999.
"""

import math
import random
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from growth.errors import refuse
from growth.training.neurons import Neurons, Part, neurons_of, taken_out

Regrow = Literal["gradient", "random"]
End = Literal["dense", "pruned"]
FIRST, SECOND = ("exp_avg", "momentum_buffer"), ("exp_avg_sq", "max_exp_avg_sq")
WHAT = "prune and regrow"


class PruneAndRegrow(TrainerCallback, ExportableState):
    """Holds a `share` of each feed-forward block's neurons out, and swaps some every `every` steps.

    until: the step from which on nothing is swapped; default: three quarters of them. end: "dense", where all
    that are out are grown then, or "pruned", where they stay out, and `taken_out` lists them. seed: of fresh
    weights; default: the Trainer's.

    A callback for any `transformers.Trainer`, on any number of processes. What is out is in
    trainer_state.json: a resumed run equals an unbroken one. Raises Refusal where an option is none, and in
    training where no family knows the model, where its weights are shared out (FSDP), and for optimizers
    whose state has no entry for each weight (Adafactor, Muon).
    """

    def __init__(
        self,
        every: int,
        share: float = 0.3,
        swap: float = 0.3,
        until: int | None = None,
        regrow: Regrow = "gradient",
        end: End = "dense",
        seed: int | None = None,
    ):
        if every < 1 or (until is not None and until <= every):
            got = f"every {every}, until {until}"
            raise refuse(WHAT, "steps 1 <= every < until", got, "choose others")
        for name, x in (("share", share), ("swap", swap)):
            if not 0 < x < 1:
                raise refuse(WHAT, f"a {name} of the neurons above 0 and below 1", x, "0.3 is RigL's swap")
        for name, x, choices in (("regrow", regrow, get_args(Regrow)), ("end", end, get_args(End))):
            if x not in choices:
                raise refuse(WHAT, f"{name} {' or '.join(choices)}", x, "choose one of these")
        self.every, self.share, self.swap, self.until = every, share, swap, until
        self.regrow, self.end, self.seed = regrow, end, seed
        self.out: dict[str, list[int]] = {}
        self._waiting: dict[str, tuple[list[int], int]] = {}

    def state(self) -> dict:
        names = ("every", "share", "swap", "until", "regrow", "end", "seed")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"out": self.out}}

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self._until = 3 * state.max_steps // 4 if self.until is None else self.until
        if not self.every < self._until <= state.max_steps:
            expected = f"to begin and end within the {state.max_steps} steps"
            got = f"every {self.every}, until {self._until}"
            raise refuse(WHAT, expected, got, "choose smaller numbers")
        self._neurons = neurons_of(model, WHAT)
        self._waiting, self._looked = {}, False
        self.out = {name: [] for name in self._neurons}
        if state.global_step and (saved := state.stateful_callbacks.get(type(self).__name__)):
            self.out |= saved["attributes"]["out"]
            zeros = taken_out(model)
            if any(not set(units) <= set(zeros.get(name, ())) for name, units in self.out.items()):
                remedy = "let it end before a model is grown"
                raise refuse(WHAT, "the model whose neurons are out", "another", remedy)

    def on_step_begin(self, args, state, control, *, optimizer, **kwargs):
        step, until = state.global_step, self._until
        if step and not self._looked:
            _refuse_other_state(optimizer, self._neurons)
            self._looked = True
        if not step or step > until or (step % self.every and step != until):
            return
        for name, neurons in self._neurons.items():
            draw = random.Random(f"{args.seed if self.seed is None else self.seed} {step} {name}")
            if step < until:
                rate = self.swap / 2 * (1 + math.cos(math.pi * step / until))
                self._swap(name, neurons, rate, draw, optimizer)
            elif self.end == "dense":
                _write(neurons, self.out[name], self.out[name], draw)
                self._enter(name, self.out[name], optimizer)

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        for name, (candidates, k) in self._waiting.items():
            norms = self._neurons[name].gradients().tolist()
            self._enter(name, sorted(candidates, key=lambda unit: -norms[unit])[:k], optimizer)
            for part in self._neurons[name].parts:
                if part.parameter.grad is not None:
                    part.parameter.grad[part.theirs(self.out[name])] = 0
        self._waiting = {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, out in self.out.items():
            _clear(self._neurons[name], out)

    def _swap(
        self, name: str, neurons: Neurons, rate: float, draw: random.Random, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes out the smallest; of those that were out, some are grown, or wait for their gradients."""
        before = self.out[name]
        kept = neurons.units - round(self.share * neurons.units)
        k = min(round(rate * kept), len(before)) if before else neurons.units - kept
        sizes = neurons.magnitudes()
        sizes[torch.tensor(before, dtype=torch.long)] = math.inf
        gone = sizes.argsort(stable=True)[:k].tolist()
        self.out[name] = sorted(before + gone)
        _clear(neurons, gone)
        for part, _, values in _moments(neurons, optimizer):
            values[part.theirs(gone)] = 0
        grown = sorted(draw.sample(before, k)) if before and self.regrow == "random" else []
        _write(neurons, grown or before, self.out[name], draw)
        if grown:
            self._enter(name, grown, optimizer)
        elif before:
            self._waiting[name] = before, k

    def _enter(self, name: str, grown: list[int], optimizer: torch.optim.Optimizer) -> None:
        """These are in from now on, with moments of their own."""
        out, neurons = self.out[name], self._neurons[name]
        for part, key, values in _moments(neurons, optimizer):
            known = values[~part.theirs(out)]
            values[part.theirs(grown)] = known.mean() if key in SECOND and len(known) else 0.0
        self.out[name] = [unit for unit in out if unit not in {*grown}]


def _clear(neurons: Neurons, units: list[int]) -> None:
    for part in neurons.parts:
        part.parameter.data[part.theirs(units)] = 0


def _write(neurons: Neurons, units: list[int], out: list[int], draw: random.Random) -> None:
    """Fresh weights that write these neurons, as large as those of the neurons that are in; biases stay 0."""
    inside = [unit for unit in range(neurons.units) if unit not in {*out}]
    generator = torch.Generator().manual_seed(draw.getrandbits(63))
    for part in neurons.parts:
        x, theirs = part.parameter.data, part.theirs(units, "writes")
        if x.dim() > 1 and theirs.any():
            std = x[part.theirs(inside, "writes")].float().std().cpu()
            x[theirs] = (std * torch.randn(int(theirs.sum()), generator=generator)).to(x)


def _moments(neurons: Neurons, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Part, str, Tensor]]:
    for part in neurons.parts:
        for key, values in optimizer.state.get(part.parameter, {}).items():
            if key in FIRST + SECOND and values is not None:
                yield part, key, values


def _refuse_other_state(optimizer: torch.optim.Optimizer, found: Mapping[str, Neurons]) -> None:
    """Raises Refusal where an optimizer has another state than moments like its parameters, and counts."""
    for neurons in found.values():
        for part in neurons.parts:
            for key, values in optimizer.state.get(part.parameter, {}).items():
                like = isinstance(values, Tensor) and values.dim()
                if like and (key not in FIRST + SECOND or values.shape != part.parameter.shape):
                    got = f"one with {key} of shape {tuple(values.shape)}"
                    raise refuse(WHAT, "an optimizer like Adam or SGD", got, "train with AdamW")
