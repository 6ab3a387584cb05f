"""Stop where the loss is no number, before anything is spoilt by it."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from growth.errors import Refusal, refuse


class NotFinite(Refusal):
    """A loss that is not finite, its step (counted from 1) and batch; of weights that are not, no batch.

    good: the last step after which the weights do not lead to it at every rate.
    """

    def __init__(
        self,
        step: int,
        got: str,
        batch: str = "",
        remedy: str = "choose a lower learning rate",
        good: int = 0,
    ):
        of = f" on the batch {batch}" if batch else ""
        super().__init__(str(refuse(f"step {step}", "a finite loss", f"{got}{of}", remedy)))
        self.step, self.got, self.batch, self.good = step, got, batch, good

    def with_remedy(self, remedy: str) -> "NotFinite":
        return NotFinite(self.step, self.got, self.batch, remedy, self.good)


class StopOnNaN(TrainerCallback):
    """Raises NotFinite in the forward whose loss is not finite, so that no weight learns from it.

    A callback for any `transformers.Trainer`, under accumulation and mixed precision too. Where the output
    has no loss its logits are looked at. Before a checkpoint is saved the weights must be finite; they may
    still lead to the loss that stops (`NotFinite.good`). Waits for the loss of every batch, as the Trainer
    itself does with its `logging_nan_inf_filter`, which may be off beside this.
    """

    def __init__(self):
        self._step, self._hook, self._optimizer = 0, None, None

    def on_train_begin(self, args, state, control, *, model, optimizer=None, **kwargs):
        self._step, self._optimizer = state.global_step + 1, optimizer
        self._hook = model.register_forward_hook(self._look, with_kwargs=True)

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self._step = state.global_step + 1
        if control.should_save:
            for name, x in model.named_parameters():
                if not is_finite(x):
                    step, got = state.global_step, f"weights that are not, in {name}"
                    self._stop(NotFinite(step, got, good=good_before(step, self._optimizer)))

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()

    def _look(self, module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        if not module.training:
            return
        loss = output.get("loss")
        value = (output["logits"].sum(dtype=torch.float32) if loss is None else loss).detach()
        if not value.isfinite():
            got = f"{value.item()}" if loss is not None else "logits that are not"
            good = good_before(self._step - 1, self._optimizer)
            self._stop(NotFinite(self._step, got, fingerprint(named), good=good))

    def _stop(self, why: NotFinite) -> None:
        self._hook.remove()
        raise why


def good_before(bad: int, optimizer: Optimizer | None) -> int:
    """The last step from which a lower rate may lead elsewhere, where the weights after step `bad` give no
    number: the one before `bad`, or the one before that where the gradient of step `bad` was no number at any
    rate, which Adam's moments then hold."""
    states = optimizer.state.values() if optimizer else ()
    spoilt = any(isinstance(x, Tensor) and not is_finite(x) for state in states for x in state.values())
    return bad - 1 - spoilt


def is_finite(x: Tensor) -> bool:
    """Whether all numbers of a tensor are, or of what this process has of it."""
    return bool(getattr(x, "to_local", lambda: x)().isfinite().all())


def fingerprint(batch: dict[str, Any]) -> str:
    """A checksum of a batch's tensors, the same on every device."""
    crc = 0
    for name in sorted(name for name, x in batch.items() if isinstance(x, Tensor) and x.dim()):
        crc = zlib.crc32(batch[name].detach().cpu().contiguous().numpy(), crc)
    return f"{crc:08x}"
