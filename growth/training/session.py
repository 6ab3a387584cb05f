"""One run of the Trainer, from what was asked for to the report."""

import copy
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.families import model_of
from growth.loading import load_model
from growth.training.curve import Curve
from growth.training.data import Collator, Windows
from growth.training.finite import NotFinite, StopOnNaN
from growth.training.flops import Saving, step_flops
from growth.training.freeze import UnfreezeOnPlateau, named_parameters
from growth.training.kernels import on_kernels
from growth.training.layers import layers_of
from growth.training.masks import OpenMasks
from growth.training.moments import moments_in_memory
from growth.training.packing import refuse_mixing
from growth.training.progress import RunProgress
from growth.training.rates import shares_of
from growth.training.result import TrainReport, save, write_companions
from growth.training.run import MODEL, kept_before, refuse_full
from growth.training.schedule import Schedule
from growth.training.scheduled import ScheduledTrainer, summed_loss
from growth.training.task import Task
from growth.training.teacher import taught
from growth.training.token_dropping import TokenDropping, refuse_packed, refuse_taught
from growth.training.warming import WarmNewUnits


@dataclass(frozen=True)
class Session:
    """What a run is made of; its folder is there already.

    settings: by the names of train's arguments. frozen: names to hold still. shares: of the rate, by patterns
    of names; scaled: shares of what keeps its decay, by names. teacher: to learn from, if any. callbacks:
    the caller's own. masking: what opens the masks of what is new, if anything is.
    """

    out: Path
    checkpoint: Checkpoint
    work: Task
    args: TrainingArguments
    settings: dict
    rate: Schedule
    frozen: list[str]
    shares: Mapping[str, float]
    scaled: Mapping[str, float]
    teacher: Checkpoint | None
    callbacks: Sequence[TrainerCallback] = ()
    masking: OpenMasks | None = None

    def trained(self, last: str | None, progress: RunProgress) -> TrainReport:
        """Trains, on from the checkpoint `last` if there is one; what is written lies in the run's folder."""
        network = load_model(self.checkpoint.path)
        return self.by_parameters(network)._trained(network, last, progress)

    def by_parameters(self, network: PreTrainedModel) -> "Session":
        """The same, by the names of the parameters in memory."""
        names = in_memory(network, self.checkpoint)
        frozen = whole("freeze", self.frozen, names)
        for share in dict.fromkeys(self.shares.values()):
            whole("copied-rate", [name for name, x in self.shares.items() if x == share], names)
        shares: dict[str, float] = {}  # in their order: the first pattern that matches counts
        for name, share in self.shares.items():
            shares.setdefault(names.get(name, name), share)
        scaled = {names.get(name, name): share for name, share in self.scaled.items()}
        return replace(self, frozen=frozen, shares=shares, scaled=scaled)

    @property
    def packed(self) -> bool:
        return isinstance(self.work.examples, Windows) and self.work.examples.packed

    @property
    def saves(self) -> int:
        """How many checkpoints are written from the first step to the last."""
        every = self.settings["save_every"]
        return math.ceil(self.args.max_steps / every) if every else 0

    def refuse_unfit(self, network: PreTrainedModel) -> None:
        """Raises Refusal where the model cannot be trained as asked, or the disk has no room."""
        dropping = any(isinstance(callback, TokenDropping) for callback in self.callbacks)
        if self.packed:
            refuse_mixing(network)
            if dropping:
                raise refuse_packed()
        if dropping and self.teacher:
            raise refuse_taught()
        for shares in (self.shares, self.scaled):
            shares_of(network, shares)
        if self.settings["gradient_checkpointing"] and not network.supports_gradient_checkpointing:
            expected = "a model that can compute its layers again"
            raise refuse("gradient-checkpointing", expected, type(network).__name__, "leave it out")
        kept = self.settings["keep_optimizer"]
        refuse_full(Path(self.args.output_dir), *self.sizes(network), self.saves, kept)

    def sizes(self, network: PreTrainedModel) -> tuple[int, int]:
        """The parameters, and those of them that are not held still to the end."""
        held = () if self.settings["unfreeze"] else named_parameters(network, self.frozen)
        parameters = network.num_parameters()
        return parameters, parameters - sum(x.numel() for x in held)

    def _trained(self, network: PreTrainedModel, last: str | None, progress: RunProgress) -> TrainReport:
        given, args, source = self.settings, self.args, self.checkpoint.path
        asked = copy.deepcopy(network.config)  # the Trainer turns its cache off, and leaves it off
        self.refuse_unfit(network)
        if given["gradient_checkpointing"]:
            network.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        if args.process_index == 0:
            folder = Path(args.output_dir) / MODEL
            write_companions(folder, source, self.work, self.checkpoint.record())
        weight, temperature = given["teacher_weight"], given["temperature"]
        kernels = partial(on_kernels, wanted=given["kernels"], say=progress.say)
        with (
            kernels(network),
            taught(network, self.teacher, weight, temperature, args.device, self.packed, kernels),
        ):
            engine, report = self._run(network, last, progress)
            network.config = asked
            save(engine, report, source)
        return report

    def _run(
        self, network: PreTrainedModel, last: str | None, progress: RunProgress
    ) -> tuple[ScheduledTrainer, TrainReport]:
        given, args, work = self.settings, self.args, self.work
        freezing = self._freezing() if self.frozen else None
        dropping = [callback for callback in self.callbacks if isinstance(callback, TokenDropping)]
        causal = work.collate is None and work.examples.length is not None
        engine = ScheduledTrainer(
            self.rate,
            model=network,
            args=args,
            data_collator=_numbered(work.collate, args, last) if work.collate else None,
            train_dataset=work.examples,
            callbacks=[
                StopOnNaN(),
                *(x for x in (freezing, self.masking) if x),
                *self._warming(),
                *self.callbacks,
            ],
            loss=None if causal or self.teacher else partial(_summed, dropping=dropping),
            rates=self.shares,
            scaled=self.scaled,
            moments=moments_in_memory(network, self.checkpoint) if given["moments"] and not last else None,
        )
        batch = work.first(args.per_device_train_batch_size)
        batch = {key: value.to(args.device) for key, value in batch.items()}
        batches = args.world_size * args.gradient_accumulation_steps
        network.train(given["gradient_checkpointing"])  # layers are computed again in training alone
        saving = [callback for callback in self.callbacks if isinstance(callback, Saving)]
        layers = (
            [name for stack in layers_of(network, "callbacks").values() for name in stack] if saving else []
        )
        whole = step_flops(network, batch, modules=layers).times(batches)
        held = step_flops(network, batch, self.frozen, layers).times(batches) if freezing else whole
        network.eval()
        log = engine.log if args.report_to else None
        curve = Curve(work.measure, given["eval_every"], whole, held, freezing, progress, saving, log)
        engine.add_callback(curve)
        if self.masking:
            progress.say(f"masks of what is new open in {self.masking.steps} steps")
        try:
            if last and last.endswith(f"-{args.max_steps}"):
                engine.restore(last)
            else:
                engine.train(resume_from_checkpoint=last)
        except NotFinite as error:
            raise error.with_remedy(kept_before(Path(args.output_dir), error)) from error
        report = TrainReport(
            self.out,
            curve.points,
            network.num_parameters(),
            whole.total,
            freezing.unfrozen_at if freezing else None,
            given,
        )
        return engine, report

    def _warming(self) -> list[WarmNewUnits]:
        steps = self.settings["warm_new"]
        return [WarmNewUnits(self.checkpoint.path, steps)] if steps else []

    def _freezing(self) -> UnfreezeOnPlateau:
        given = self.settings
        least = given["threshold"] if given["unfreeze"] else -math.inf  # no loss improves by less than that
        return UnfreezeOnPlateau(
            self.frozen, least, given["patience"], given["warmup"], given["patience_counts"]
        )


def in_memory(network: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The names of tensors on disk, as growth.json has them -> those of the parameters that they become, or
    become a part of, as experts' matrices do."""
    seen = model_of(checkpoint.config, checkpoint.names)
    if seen is None:
        return {}
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    found = {on_disk: name for name in names if (on_disk := seen.named(name))}
    for pattern, joined in seen.family.fused.items():
        parts = [name for name in seen.table() if re.fullmatch(pattern, name)]
        for name in parts:
            found[name] = re.sub(pattern, joined, name)
            found.pop(found[name], None)  # no tensor on disk has that name
    return found


def whole(what: str, names: Sequence[str], memory: Mapping[str, str]) -> list[str]:
    """The parameters that tensors of these names become; names of others stay.

    Raises Refusal where only some of the tensors that are joined in a parameter are named.
    """
    wanted, parts = set(names), Counter(memory.values())
    for joined, count in parts.items():
        named = sum(memory[name] == joined for name in wanted & memory.keys()) if count > 1 else 0
        if 0 < named < count:
            expected = f"all or none of the {count} tensors that {joined} is made of in memory"
            raise refuse(what, expected, named, "leave it out, or name parameters in a Trainer of your own")
    return list(dict.fromkeys(memory.get(name, name) for name in names))


def _summed(outputs, labels, num_items_in_batch=None, *, dropping: Sequence[TokenDropping] = ()) -> Tensor:
    """summed_loss, of which those learn who drop tokens: the Trainer takes the labels away from the model."""
    for callback in dropping:
        callback.learn(outputs["logits"], labels)
    return summed_loss(outputs, labels, num_items_in_batch)


def _numbered(masked: Collator, args: TrainingArguments, last: str | None) -> Collator:
    """Masks each window under a seed of its own, by its place among all that are trained on: these masks are
    the same in a run resumed from `last`, and on any number of processes.

    The Trainer's random numbers do not bring them back: it draws a batch ahead of the step that it saves.
    """
    N, size = args.world_size, args.per_device_train_batch_size
    done = int(last.rpartition("-")[2]) * args.gradient_accumulation_steps if last else 0
    batches = itertools.count(done * N + args.process_index, N)

    def collate(windows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        first = next(batches) * size
        seeds = (zlib.crc32(f"{args.seed} {first + i}".encode()) for i in range(size))
        rows = [masked([window], seed) for window, seed in zip(windows, seeds)]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    return collate
