"""The teacher of `growth train --teacher`: found before anything is written, loaded when the run begins."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from growth.checkpoint import Checkpoint
from growth.companions import tokenizer_files
from growth.errors import refuse
from growth.families import model_of
from growth.loading import load_model, load_tokenizer
from growth.tokenizing import other_tokens
from growth.training.data import positions
from growth.training.distil import distilled
from growth.training.packing import refuse_mixing


def find_teacher(src: str | Path, student: Checkpoint, length: int | None) -> Checkpoint:
    """The checkpoint `src`, a folder or the Hub's.

    Raises Refusal where it is of another kind or vocabulary than the student, has another tokenizer, or fewer
    positions than a window of `length` has tokens.
    """
    teacher = Checkpoint(src)
    own, other = (model_of(x.config, x.names) for x in (student, teacher))
    if length is None or (own and other and own.auto is not other.auto):
        remedy = "name another, or train without"
        kind = f"a language model as the student is, a {student.config.model_type}"
        raise refuse(f"teacher {src}", kind, teacher.config.model_type, remedy)
    V, got = (getattr(x.config, "vocab_size", None) for x in (student, teacher))
    remedy = "name one that was trained with the student's tokenizer"
    if V != got:
        raise refuse(f"teacher {src}", f"the student's vocabulary of {V} tokens", got, remedy)
    if tokenizer_files(teacher.path):
        if got := other_tokens(*(load_tokenizer(x.path) for x in (student, teacher))):
            raise refuse(f"teacher {src}", "the student's tokenizer", got, remedy)
    if (most := positions(teacher.config)) and length > most:
        expected = f"at least {length} positions, a window's tokens"
        raise refuse(f"teacher {src}", expected, most, "pass a shorter --sequence-length")
    return teacher


@contextlib.contextmanager
def taught(
    student: PreTrainedModel,
    teacher: Checkpoint | None,
    weight: float,
    temperature: float,
    device: torch.device,
    packed: bool,
    kernels: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> Iterator[None]:
    """The student learns from the teacher inside (training.distil), which is loaded in the dtype it has and
    computes inside `kernels`."""
    if teacher is None:
        yield
        return
    model = load_model(teacher.path, teacher.coarsest).requires_grad_(False).to(device)
    if packed:
        model.config.use_cache = False
        refuse_mixing(model, f"teacher {teacher.name}")
    with kernels(model), distilled(student.to(device), model, weight=weight, temperature=temperature):
        yield
