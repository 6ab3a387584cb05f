"""The validation loss of a run against the operations and the seconds spent on it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from growth.errors import refuse
from growth.training.finite import NotFinite, good_before
from growth.training.flops import Saving, StepFlops
from growth.training.freeze import UnfreezeOnPlateau
from growth.training.progress import RunProgress
from growth.training.sharded import reshard

EVAL_TOKENS = 8192  # a batch of evaluation: its float32 logits take 1.6 GB with a vocabulary of 50k
EVAL_IMAGES = 64


@dataclass(frozen=True)
class Point:
    """After `step` steps: floating-point operations and seconds of training so far, loss in nats a token, or
    an image."""

    step: int
    flops: int
    seconds: float
    loss: float


class Curve(TrainerCallback, ExportableState):
    """Measures the loss before the first step, every `every` steps, after the last one.

    measure: a model's validation loss; step_flops: what a step costs; frozen_flops: while `freezing`, if any,
    keeps weights frozen; saving: the callbacks, called before this one, that leave a part of a step out; log:
    is told each loss, as eval_loss. The clock stands still during measurements and saves. A resumed run goes
    on with the points and the clock it had.
    """

    def __init__(
        self,
        measure: Callable[[nn.Module], float],
        every: int,
        step_flops: StepFlops,
        frozen_flops: StepFlops,
        freezing: UnfreezeOnPlateau | None,
        progress: RunProgress,
        saving: Sequence[Saving] = (),
        log: Callable[[dict[str, float]], None] | None = None,
    ):
        self.measure, self.every, self.log = measure, every, log
        self.step_flops, self.frozen_flops, self.freezing = step_flops, frozen_flops, freezing
        self.progress, self.saving = progress, saving
        self.points: list[Point] = []
        self._flops, self._seconds, self._since = 0, 0.0, None

    def state(self) -> dict:
        points = [asdict(point) for point in self.points]
        return {"args": {}, "attributes": {"points": points, "flops": self._flops, "seconds": self._seconds}}

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        if state.global_step:
            saved = state.stateful_callbacks[type(self).__name__]["attributes"]
            self.points = [Point(**point) for point in saved["points"]]
            self._flops, self._seconds = saved["flops"], saved["seconds"]
        else:
            self._measure(model, 0, control)
            if not math.isfinite(loss := self.points[0].loss):
                remedy = "look for numbers that are not finite in the model"
                raise refuse("model", "a finite loss before the first step", loss, remedy)
        self._since = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        frozen = self.freezing is not None and self.freezing.unfrozen_at is None
        flops = self.frozen_flops if frozen else self.step_flops
        for callback in self.saving:
            flops = callback.spent(flops)
        self._flops += flops.total

    def on_step_end(self, args, state, control, *, model, optimizer=None, **kwargs):
        step = state.global_step
        self.progress.step(step)
        due = step % self.every == 0 or step == state.max_steps
        if due or control.should_save:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # steps that are only queued have not been paid for
            self._seconds += time.perf_counter() - self._since
            if due:
                self._measure(model, step, control)
                self._refuse_not_finite(optimizer)
            self._since = time.perf_counter()

    def on_train_end(self, args, state, control, *, model, optimizer=None, **kwargs):
        if self.points[-1].step < state.global_step:  # another callback stopped it
            self._seconds += time.perf_counter() - self._since
            self._measure(model, state.global_step, control)
            self._refuse_not_finite(optimizer)

    def on_save(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def _refuse_not_finite(self, optimizer: Optimizer | None) -> None:
        """Before a checkpoint is saved of weights that give no number."""
        last = self.points[-1]
        if not math.isfinite(last.loss):
            got = f"a validation loss of {last.loss}"
            raise NotFinite(last.step, got, good=good_before(last.step, optimizer))

    def _measure(self, model: nn.Module, step: int, control: TrainerControl) -> None:
        loss = self.measure(model)
        self.points.append(Point(step, self._flops, self._seconds, loss))
        self.progress.loss(step, loss, self._seconds)
        if self.log:
            due = control.should_log
            self.log({"eval_loss": loss})
            control.should_log = due  # the training loss, which the Trainer now takes for told


def evaluate(model: nn.Module, windows: Tensor, labels: Tensor | None = None) -> float:
    """The mean loss of a model over windows [N, T], nats a predicted token, dropout off.

    A causal model predicts the tokens that follow; a masked one `labels` [N, T], but where they are -100.
    """
    if labels is None:
        return window_losses(model, windows).mean().item()
    return _losses(model, windows, labels)[labels != -100].mean().item()


def window_losses(
    model: nn.Module, windows: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """A causal model's mean loss on each window, [N]: how surely two means differ is in these.

    labels [N, T]: where the windows differ from what is to be predicted, -100 where nothing is. position_ids
    [N, T]: of packed windows.
    """
    labels = (windows if labels is None else labels)[:, 1:]
    losses = _losses(model, windows, labels, position_ids)
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def image_losses(model: nn.Module, pixel_values: Tensor, labels: Tensor) -> Tensor:
    """A classifier's loss on each image, [N]."""
    return F.cross_entropy(class_logits(model, pixel_values), labels, reduction="none")


def class_logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """A classifier's logits [N, classes], in float32, dropout off."""
    with _evaluating(model) as device:
        parts = [model(pixel_values=x.to(device)).logits.float() for x in pixel_values.split(EVAL_IMAGES)]
    return torch.cat(parts).cpu()


def _losses(model: nn.Module, windows: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The loss at the first positions of each window, as many as there are labels; 0 where one is -100."""
    losses, N = [], max(1, EVAL_TOKENS // windows.shape[1])
    places = [{}] * len(windows.split(N))
    if position_ids is not None:  # in a cache, packed rows would run into each other
        places = [{"position_ids": x, "use_cache": False} for x in position_ids.split(N)]
    with _evaluating(model) as device:
        for x, y, place in zip(windows.split(N), labels.split(N), places):
            place = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in place.items()}
            logits = model(input_ids=x.to(device), **place).logits[:, : y.shape[1]].float()
            losses.append(F.cross_entropy(logits.mT, y.to(device), reduction="none").cpu())
    return torch.cat(losses)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """No gradients and no dropout inside; gives the model's device."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield next(model.parameters()).device
    reshard(model)
    model.train(training)
