"""Learn a teacher's distribution beside the data: logits of a few tokens at a time, of both models.

    loss = (1 - weight) CE(student, labels) + weight T^2 KL(softmax(teacher / T) || softmax(student / T))

both means over the predicted tokens.  Hinton et al., 2015 (arXiv 1503.02531).
"""

import copy
import functools
import inspect
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from growth.errors import reason, refuse

LOGITS = 1 << 24  # of each model at a time: 64 MB in float32, 330 tokens of a vocabulary of 50k
OWN = ("labels", "num_items_in_batch")  # what a language model keeps from its body


class Head:
    """A language model's logits from its body's last hidden states, whatever it does to them.

    It is the model's own forward around a body that gives what it is given: biases, scales and caps of the
    logits are the family's.
    """

    def __init__(self, model: PreTrainedModel):
        self.prefix, self.model = model.base_model_prefix, copy.copy(model)
        self.model._modules = {**model._modules, self.prefix: _Given()}  # the other modules are the model's

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [n, D]: logits [n, V], in float32 at least."""
        logits = type(self.model).forward(self.model, inputs_embeds=hidden[None]).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Given(nn.Module):
    """A body whose last hidden states are its inputs_embeds; some models ask their body's decoder."""

    @property
    def decoder(self) -> "_Given":
        return self

    def forward(self, *arguments: Any, inputs_embeds: Tensor, **others: Any) -> "_Hidden":
        return _Hidden(inputs_embeds)


class _Hidden(tuple):
    """A body's output that has its last hidden states alone."""

    def __new__(cls, hidden: Tensor) -> "_Hidden":
        return super().__new__(cls, (hidden,))

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


@contextmanager
def distilled(
    student: PreTrainedModel, teacher: PreTrainedModel, *, weight: float = 0.5, temperature: float = 1.0
) -> Iterator[None]:
    """Inside, `student(..., labels=labels).loss` is the module's equation, and no logits are returned.

    For any loop and any `transformers.Trainer`, which is made inside: with it accumulation, mixed precision,
    DDP and gradient checkpointing. Without labels, and where no gradient is asked for, the student is as it
    was: what is evaluated is the data's loss alone. The teacher, which is on the student's device and is put
    in eval mode, gets the student's other arguments, and no gradient.

    Logits [B, T, V] of neither model ever exist: both heads run on LOGITS / V tokens at a time, and once more
    in the backward. A masked student learns at its masked tokens alone.

    Raises Refusal where weight or temperature is none, where the vocabularies differ, where one model is
    masked and the other is not, and where logits are not a function of the last hidden states.
    """
    refuse_odd_mix(weight, temperature)
    V, other = student.config.vocab_size, teacher.config.vocab_size
    if V != other:
        remedy = "name a teacher with the student's tokenizer"
        raise refuse("teacher", f"the student's vocabulary of {V} tokens", other, remedy)
    if (masked := _masked(student)) != _masked(teacher):
        expected = f"a {'masked' if masked else 'causal'} language model, as the student is"
        raise refuse("teacher", expected, type(teacher).__name__, "name another")
    teacher.eval().config.use_cache = False  # which would hold keys and values of every layer
    for name, model in (("student", student), ("teacher", teacher)):
        _refuse_other_heads(name, model, masked)
    mixed = _Mixed(student, teacher, weight, temperature, masked)
    plain = student.forward
    signature = inspect.signature(plain)
    others = [x.name for x in signature.parameters.values() if x.kind is x.VAR_KEYWORD]

    @functools.wraps(plain.__func__)  # whose signature the Trainer reads, from `self` on
    def forward(self: PreTrainedModel, *arguments: Any, **named: Any) -> Any:
        named = signature.bind(*arguments, **named).arguments
        for name in others:
            named |= named.pop(name, {})
        if named.get("labels") is None or not torch.is_grad_enabled():
            return plain(**named)
        return CausalLMOutput(loss=mixed(named))

    student.forward = types.MethodType(forward, student)  # accelerate, too, looks for a method
    try:
        yield
    finally:
        student.__dict__.pop("forward", None)


def refuse_odd_mix(weight: float, temperature: float) -> None:
    """Raises Refusal where one of them is none."""
    if not 0 < weight <= 1:
        raise refuse("teacher weight", "a share of the loss, above 0 and at most 1", weight, "0.5 is usual")
    if not 0 < temperature < float("inf"):
        raise refuse("temperature", "above 0, and finite", temperature, "1 is usual")


class _Mixed:
    """The loss of a batch."""

    def __init__(self, student, teacher, weight: float, temperature: float, masked: bool):
        self.student, self.teacher, self.masked = student, teacher, masked
        self.weight, self.temperature = weight, temperature
        self.heads = Head(student), Head(teacher)

    def __call__(self, named: dict[str, Any]) -> Tensor:
        labels, count = (named.get(name) for name in OWN)
        inputs = {name: x for name, x in named.items() if name not in OWN}
        hidden = _hidden(self.student, inputs)
        with torch.no_grad():
            taught = _hidden(self.teacher, inputs)
        if not self.masked:
            hidden, taught, labels = hidden[:, :-1], taught[:, :-1], labels[:, 1:]
        known = labels != -100
        hidden, taught, labels = hidden[known], taught[known], labels[known]
        n = max(1, LOGITS // self.student.config.vocab_size)
        parts = zip(hidden.split(n), taught.split(n), labels.split(n))
        losses = [
            checkpoint(self.part, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
        ]
        return torch.stack(losses).sum() / (len(labels) if count is None else count)

    def part(self, hidden: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """The sum over some tokens."""
        logits = self.heads[0](hidden)
        with torch.no_grad():
            target = F.log_softmax(self.heads[1](taught).to(logits.dtype) / self.temperature, -1)
        own = F.log_softmax(logits / self.temperature, -1)
        far = F.kl_div(own, target, log_target=True, reduction="sum") * self.temperature**2
        return (1 - self.weight) * F.cross_entropy(logits, labels, reduction="sum") + self.weight * far


def _hidden(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    return getattr(model, model.base_model_prefix)(**inputs)[0]


def _masked(model: PreTrainedModel) -> bool:
    return type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def _refuse_other_heads(what: str, model: PreTrainedModel, masked: bool) -> None:
    """Raises Refusal where a body and a Head do not give the model's logits and loss of a few tokens."""
    training = model.training
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, labels=ids)
            logits = Head(model)(_hidden(model, {"input_ids": ids})[0])
            seen, labels = (logits, ids[0]) if masked else (logits[:-1], ids[0, 1:])
            loss = F.cross_entropy(seen, labels)
        far = max((logits - whole.logits[0]).abs().max().item(), (loss - whole.loss).abs().item())
        rounding = max(torch.finfo(kind).eps for kind in (model.dtype, torch.float32))  # losses are in that
        near = far <= rounding**0.5 * whole.logits.abs().max().item()
        why = "" if near else f"whose logits or loss are others by {far:.1e}"
        if math.isnan(far):
            why = "which gives numbers that are not finite"
    except Exception as error:  # a model that is made otherwise fails as it may
        why = f"which fails so: {reason(error)}"
    finally:
        model.train(training)
    if why:
        expected = "a language model whose logits follow from its body's last hidden states"
        raise refuse(
            what, expected, f"{type(model).__name__}, {why}", "train without a teacher, or name another model"
        )
