"""What `growth train --dry-run` tells: what would be trained, on what, how long, and what that takes."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from growth.costs.machines import H200, UTILISATION
from growth.costs.told import gb
from growth.costs.training import Steps, most
from growth.errors import Refusal
from growth.families import model_of
from growth.loading import load_model, on_meta
from growth.plan import Source
from growth.training.run import at_a_time, checkpoint_bytes, divided, newest
from growth.training.session import Session


@dataclass(frozen=True)
class Takes:
    """flops: of a step on all processes. memory: the most bytes that each of them holds. seconds: of the run
    on an H200 a process, in bfloat16, at UTILISATION."""

    flops: int
    memory: float
    seconds: float


@dataclass(frozen=True)
class TrainPlan:
    """What `train` would do.

    trained: parameters that are not held still to the end. examples, held_out: windows or images. epochs:
    how often each is seen. goes_on: from what, "" for a run that begins. takes: None where growth does not
    know the model's family.
    """

    source: Path
    parameters: int
    trained: int
    unit: str
    examples: int
    held_out: int
    each_step: int
    tokens: int
    epochs: float
    checkpoints: int
    checkpoint_bytes: int
    goes_on: str
    takes: Takes | None
    settings: dict

    def json(self) -> dict:
        return asdict(self) | {"source": str(self.source), "out": None}  # which the report of a run names

    def lines(self) -> Iterator[str]:
        asked, length = self.settings, self.settings["sequence_length"]
        each = f" of {length} tokens" if length else ""
        yield f"model: {self.parameters:,} parameters, {self.trained:,} of them trained"
        yield f"data: {self.examples:,} {self.unit}{each}, {self.held_out:,} more to measure on"
        tokens = f", {self.tokens:,} tokens" if length else ""
        yield (
            f"steps: {asked['steps']:,} of {self.each_step:,} {self.unit}{tokens}, {self.epochs:.3g} epochs; "
            f"measured every {asked['eval_every']:,}"
        )
        yield (
            f"schedule: {asked['schedule']}, {asked['warmup']:,} steps of warm-up to a rate of "
            f"{asked['learning_rate']:g}"
        )
        if self.checkpoints:
            yield (
                f"disk: {self.checkpoints} checkpoints at a time of {gb(self.checkpoint_bytes)}, "
                f"every {asked['save_every']:,} steps"
            )
        if self.goes_on:
            yield f"resume: {self.goes_on}"
        if not self.takes:
            yield "costs: none on paper, for growth has no table of this kind of model's tensors"
        else:
            took, taught = self.takes, self.settings["teacher_name"]
            seconds = "under a second" if took.seconds < 1 else f"about {took.seconds:,.0f} s"
            yield (
                f"costs: {took.flops:.3g} FLOP a step, {took.flops * asked['steps']:.3g} in all, "
                f"holds {gb(took.memory)} on each process; in bfloat16 on an {H200.name} each, at "
                f"{UTILISATION:.0%} of its peak, {seconds}"
                + (f"; the teacher {taught} is not in it" if taught else "")
            )

    def __str__(self) -> str:
        return f"{self.source} -> nothing (dry run): {self.settings['steps']} steps"


def plan_of(session: Session, resume: bool) -> TrainPlan:
    """What the session is to do. Raises Refusal where it would, as far as its model and data tell.

    resume: it goes on with the run in its folder, if there is one.
    """
    run = Path(session.args.output_dir)
    goes_on = resume and run.exists()
    if goes_on:
        divided(run, session.settings, session.checkpoint).enter(session.args, session.settings)
    checkpoint, asked, work = session.checkpoint, session.settings, session.work
    seen = model_of(checkpoint.config, checkpoint.names)
    network = on_meta(Source(checkpoint).model) if seen else load_model(checkpoint.path)
    session = session.by_parameters(network)
    session.refuse_unfit(network)
    parameters, trained = session.sizes(network)
    each = asked["processes"] * asked["batch_size"] * asked["gradient_accumulation"]
    length = work.examples.length
    return TrainPlan(
        source=checkpoint.path,
        parameters=parameters,
        trained=trained,
        unit=work.examples.unit,
        examples=len(work.examples),
        held_out=len(work.held_out),
        each_step=each,
        tokens=each * asked["steps"] * (length or 0),
        epochs=each * asked["steps"] / len(work.examples),
        checkpoints=at_a_time(session.saves),
        checkpoint_bytes=checkpoint_bytes(parameters, trained),
        goes_on=_goes_on(run) if goes_on else "",
        takes=_takes(session) if seen else None,
        settings=asked,
    )


def _goes_on(run: Path) -> str:
    return f"goes on from {saved.name}" if (saved := newest(run)) else "no checkpoint, begins at step 0"


def _takes(session: Session) -> Takes | None:
    """None where the model has no step on paper."""
    checkpoint, asked = session.checkpoint, session.settings
    seen = model_of(checkpoint.config, checkpoint.names)
    shared = asked["processes"] if session.args.fsdp else 1
    precision = "autocast" if asked["bf16"] or asked["fp16"] else "float32"
    with suppress(Refusal):
        steps = Steps(seen, asked["batch_size"], session.work.examples.length or 1)
        step = steps.step(asked["gradient_checkpointing"], precision)
        flops = step.flops * asked["gradient_accumulation"]
        seconds = asked["steps"] * flops / (H200.flops * UTILISATION)
        return Takes(flops * asked["processes"], most(step, seen.architecture.parameters, shared), seconds)
    return None
