"""One run of the Trainer, from what was asked for to the report."""

import copy
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.families import model_of
from growth.loading import load_model
from growth.training.curve import Curve
from growth.training.data import Collator, Windows
from growth.training.finite import NotFinite, StopOnNaN
from growth.training.flops import count_flops
from growth.training.freeze import UnfreezeOnPlateau, named_parameters
from growth.training.packing import refuse_mixing
from growth.training.progress import RunProgress
from growth.training.result import TrainReport, save, write_companions
from growth.training.run import MODEL, newest, refuse_full
from growth.training.schedule import Schedule
from growth.training.scheduled import ScheduledTrainer, summed_loss
from growth.training.task import Task
from growth.training.teacher import taught


@dataclass(frozen=True)
class Session:
    """What a run is made of; its folder is there already.

    settings: by the names of train's arguments. frozen: names to hold still. shares: of the rate, by patterns
    of names. teacher: to learn from, if any.
    """

    out: Path
    checkpoint: Checkpoint
    work: Task
    args: TrainingArguments
    settings: dict
    rate: Schedule
    frozen: list[str]
    shares: Mapping[str, float]
    teacher: Checkpoint | None

    def trained(self, last: str | None, progress: RunProgress) -> TrainReport:
        """Trains, on from the checkpoint `last` if there is one; what is written lies in the run's folder."""
        network = load_model(self.checkpoint.path)
        names = in_memory(network, self.checkpoint)
        frozen = whole("freeze", self.frozen, names)
        shares = {}
        for share in dict.fromkeys(self.shares.values()):
            named = [name for name, x in self.shares.items() if x == share]
            shares |= dict.fromkeys(whole("copied-rate", named, names), share)
        return replace(self, frozen=frozen, shares=shares)._trained(network, last, progress)

    def _trained(self, network: PreTrainedModel, last: str | None, progress: RunProgress) -> TrainReport:
        given, args, source = self.settings, self.args, self.checkpoint.path
        asked = copy.deepcopy(network.config)  # the Trainer turns its cache off, and leaves it off
        packed = isinstance(self.work.examples, Windows) and self.work.examples.packed
        if packed:
            refuse_mixing(network)
        if given["gradient_checkpointing"]:
            _checkpointing(network, args)
        self._refuse_full(network)
        if args.process_index == 0:
            folder = Path(args.output_dir) / MODEL
            write_companions(folder, source, self.work, self.checkpoint.record())
        weight, temperature = given["teacher_weight"], given["temperature"]
        with taught(network, self.teacher, weight, temperature, args.device, packed):
            engine, report = self._run(network, last, progress)
            network.config = asked
            save(engine, report, source)
        return report

    def _run(
        self, network: PreTrainedModel, last: str | None, progress: RunProgress
    ) -> tuple[ScheduledTrainer, TrainReport]:
        given, args, work = self.settings, self.args, self.work
        freezing = self._freezing() if self.frozen else None
        causal = work.collate is None and work.examples.length is not None
        engine = ScheduledTrainer(
            self.rate,
            model=network,
            args=args,
            data_collator=_numbered(work.collate, args, last) if work.collate else None,
            train_dataset=work.examples,
            callbacks=[StopOnNaN(), *([freezing] if freezing else [])],
            loss=None if causal or self.teacher else summed_loss,
            rates=self.shares,
        )
        batch = work.first(args.per_device_train_batch_size)
        batch = {key: value.to(args.device) for key, value in batch.items()}
        batches = args.world_size * args.gradient_accumulation_steps
        network.train(given["gradient_checkpointing"])  # layers are computed again in training alone
        step_flops = batches * count_flops(network, batch)
        frozen_flops = batches * count_flops(network, batch, self.frozen) if freezing else step_flops
        network.eval()
        log = engine.log if args.report_to else None
        curve = Curve(work.measure, given["eval_every"], step_flops, frozen_flops, freezing, progress, log)
        engine.add_callback(curve)
        try:
            if last and last.endswith(f"-{args.max_steps}"):
                engine.restore(last)
            else:
                engine.train(resume_from_checkpoint=last)
        except NotFinite as error:
            good = newest(Path(args.output_dir))
            where = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before"
            remedy = f"{where}; choose a lower learning rate, or look at that batch"
            raise NotFinite(error.step, error.got, error.batch, remedy) from error
        if not math.isfinite(curve.points[-1].loss):
            expected = "one at which the loss stays finite"
            raise refuse("learning rate", expected, given["learning_rate"], "choose a lower one")
        report = TrainReport(
            self.out,
            curve.points,
            network.num_parameters(),
            step_flops,
            freezing.unfrozen_at if freezing else None,
            given,
        )
        return engine, report

    def _freezing(self) -> UnfreezeOnPlateau:
        given = self.settings
        least = given["threshold"] if given["unfreeze"] else -math.inf  # no loss improves by less than that
        return UnfreezeOnPlateau(
            self.frozen, least, given["patience"], given["warmup"], given["patience_counts"]
        )

    def _refuse_full(self, network: PreTrainedModel) -> None:
        held = named_parameters(network, self.frozen)
        parameters, every = network.num_parameters(), self.settings["save_every"]
        trained = parameters - (0 if self.settings["unfreeze"] else sum(x.numel() for x in held))
        saves = math.ceil(self.args.max_steps / every) if every else 0
        refuse_full(Path(self.args.output_dir), parameters, trained, saves)


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


def _checkpointing(network: PreTrainedModel, args: TrainingArguments) -> None:
    if not network.supports_gradient_checkpointing:
        expected = "a model that can compute its layers again"
        raise refuse("gradient-checkpointing", expected, type(network).__name__, "leave it out")
    network.activation_checkpointing_enable(args.activation_checkpointing_kwargs)


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
