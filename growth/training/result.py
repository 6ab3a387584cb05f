"""What a run leaves: its report, and the files beside the weights."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from growth.card import title, write_card
from growth.companions import BESIDE
from growth.record import RECORD, TRAINING, trainings
from growth.training.curve import Point
from growth.training.run import MODEL
from growth.training.scheduled import ScheduledTrainer
from growth.training.task import Task
from growth.writing import say_plainly

LOGS = "runs"  # where tensorboard's are


@dataclass(frozen=True)
class TrainReport:
    """The result of `train`. curve[0] is the model as it came, curve[-1] the model that was saved in `out`.

    step_flops: operations of one step with every weight trained. unfrozen_at: the number of steps after which
    the transferred weights trained too, None where they did from the start or never. settings: what was asked
    for.
    """

    out: Path
    curve: list[Point]
    parameters: int
    step_flops: int
    unfrozen_at: int | None
    settings: dict

    def json(self) -> dict:
        return asdict(self) | {"out": str(self.out)}

    def __str__(self) -> str:
        first, last = self.curve[0], self.curve[-1]
        held = "".join(f"; {told}" for told in (self.held(), self.masked(), self.risen()) if told)
        return (
            f"{self.out}: {last.step} steps, validation loss {first.loss:.3f} -> {last.loss:.3f}, "
            f"{last.flops:.2e} FLOPs, {last.seconds:.1f} s{held}"
        )

    def held(self) -> str:
        """How long `freeze` held weights still, "" where nothing was."""
        if self.settings["freeze"] is None:
            return ""
        steps = "" if self.unfrozen_at is None else f" for {self.unfrozen_at} steps"
        return f"what came from the source was held still{steps}"

    def masked(self) -> str:
        """How masks opened, "" where there were none."""
        steps = self.settings["masks"]
        return f"the masks of what was new opened in {steps} steps" if steps else ""

    def risen(self) -> str:
        """What to do about a loss that ended more than 1 % above where it began, "" where it did not."""
        if self.curve[-1].loss <= 1.01 * self.curve[0].loss:
            return ""
        return (
            f"it rose: a learning rate below {self.settings['learning_rate']:g}, or more steps, may lower it"
        )


def write_companions(folder: Path, source: Path, work: Task, record: dict) -> None:
    """What lies beside the weights; written before the first step, it cannot fail after the last."""
    folder.mkdir(exist_ok=True)
    for half in folder.glob(".tmp*"):  # what safetensors leaves where it is killed
        half.unlink()
    if work.tokenizer:
        work.tokenizer.save_pretrained(folder)
    for file in (source / name for name in BESIDE):
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    if record:
        # How it came to be, without the promise of the source's logits: training breaks that. Masks are open,
        # and a recipe that was recorded did not make this.
        kept = {key: x for key, x in record.items() if key not in ("closed", "recipe")}
        (folder / RECORD).write_text(json.dumps(kept | {"lossless": False}, indent=1))


def save(engine: ScheduledTrainer, report: TrainReport, source: Path) -> None:
    """The trained model, its report and its card; every process calls it."""
    folder = Path(engine.args.output_dir) / MODEL
    engine.save_model(str(folder))  # gathers sharded weights, so every process calls it
    if report.settings["keep_optimizer"]:
        engine.keep_optimizer(folder)
    if engine.is_world_process_zero():
        say_plainly(folder, engine.model.config)
        (folder / "training_args.bin").unlink()
        if (logs := folder.parent / LOGS).exists():
            shutil.move(logs, folder / LOGS)
        told = report.json() | {"before": trainings(source)}
        (folder / TRAINING).write_text(json.dumps(told, indent=1))
        first, last = report.curve[0], report.curve[-1]
        each = "a token" if report.settings["sequence_length"] else "an image"
        facts = [
            f"trained by `growth train`, {last.step} steps, on {report.settings['data']}",
            f"validation loss {first.loss:.3f} -> {last.loss:.3f} nats {each}; all of it is in {TRAINING}",
        ]
        facts += [told for told in (report.held(), report.masked()) if told]
        if teacher := report.settings["teacher_name"]:
            share = report.settings["teacher_weight"]
            facts.append(f"a share {share} of its loss was the distribution of {teacher}")
        outlook, figures = "Its logits are its own, not the base model's.", "Not measured."
        write_card(folder, title(report.out), source, engine.model.config, facts, outlook, figures)
