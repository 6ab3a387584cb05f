"""Do two models agree? The proof behind "lossless"."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growth.card import write_figures
from growth.checkpoint import Checkpoint
from growth.errors import refuse, several
from growth.families import model_of
from growth.families.table import Model
from growth.generating import Continuations, continuations, refuse_no_writer
from growth.loading import load_model, quiet
from growth.probes import probe
from growth.watching import paired, reaches_the_end

# Of the largest logit. A grown weight of 16 bits is a rounded one: measured, 0.2 to 0.75 eps of the largest
# logit for 3 to 12 layers, so 2 eps are allowed. Transfer only copies.
LIMIT = {"grow": 1e-4, "shrink": 1e-4, "transfer": 1e-5}
ROUNDING = {"grow": 2.0, "shrink": 2.0, "transfer": 0.0}
HEADLESS = ("last_hidden_state", "pooler_output")  # what is compared where there are no logits


@dataclass(frozen=True)
class Agreement:
    """max |logit difference| in float32 and in the stored dtype, the largest logit, and what growth.json
    promised.

    limit: the largest difference in float32 that keeps the promise: 1e-4 for grown models, or 2 eps of the
    stored dtype where that is more, 1e-5 for transferred ones, each times the largest logit where that
    exceeds 1; None where equality was not promised. first: where the new model's outputs first differ by more
    than this share: a module, such as layers.2.mlp.down_proj, or "the last norm or the head"; "" where they
    do not. lost: why equality was not promised, as far as growth.json says so. compared: "logit", or "output"
    for models without a head: the channels of the last hidden state that the source has, and the pooled ones.
    generated: how their greedy continuations agree; None where that was not asked for.
    """

    float32: float
    stored: float
    stored_dtype: str
    largest: float
    limit: float | None
    first: str = ""
    lost: tuple[str, ...] = ()
    compared: str = "logit"
    generated: Continuations | None = None

    @property
    def kept(self) -> bool:
        """False when a promised equality fails, of logits or of continuations, or the new model's cache."""
        equal = self.limit is None or self.float32 <= self.limit
        return equal and (self.generated is None or self.generated.kept)

    def __str__(self) -> str:
        return self._logits() + (f"; {self.generated}" if self.generated else "")

    def _logits(self) -> str:
        measured = (
            f"max |{self.compared} difference|: {self.float32:.2e} in float32 "
            f"(largest {self.compared} {self.largest:.2f})"
        )
        where = f"; they first differ in {self.first}" if self.first else ""
        if self.limit is None:
            why = f": {several(self.lost)}" if self.lost else ""
            return f"{measured}{self._beside()}{where}; no equality was promised{why}"
        verdict = "kept" if self.float32 <= self.limit else "BROKEN"
        return f"{measured}, promised at most {self.limit:.1e} there: {verdict}{self._beside()}{where}"

    def _beside(self) -> str:
        """What the stored dtype gives, whose rounding no promise is about."""
        if self.stored_dtype == "float32":
            return ""
        return f"; {self.stored:.2e} in {self.stored_dtype}, as it is stored, with each model's rounding"


@torch.no_grad()
def check(
    src: str | Path,
    dst: str | Path,
    *,
    text: str | Path | None = None,
    batch: int = 2,
    length: int = 128,
    seed: int = 0,
    generate: int = 0,
) -> Agreement:
    """Compare what two models compute of `batch` random inputs of their kind: of `length` tokens, or images.

    src, dst: checkpoints, each a folder or the Hub's; the promise is the one in dst's growth.json, and holds
    for the source whose fingerprint that has. text: a file whose first tokens they read instead. generate:
    where not 0, how far their greedy continuations by so many tokens, or as half their positions reach, agree
    after 8 prompts of at most 32 tokens, random or the text's first, and whether the cache gives what the
    whole text does. The figures go into dst's README.md where growth made it of src and it is a folder.
    Raises Refusal where one cannot be read, they do not take or give the same, the text does not fit, src is
    not what the promise was made for, one gives no numbers, or, with `generate`, does not continue a text.
    """
    old, new = Checkpoint(src), Checkpoint(dst)
    if generate:
        refuse_no_writer(old, new, generate)
    inputs = probe(old, new, text, batch=batch, length=length, seed=seed)
    record = new.record()
    of_this = _refuse_another_source(old, new, record)
    left, right = (model_of(model.config, model.names) for model in (old, new))
    shrunk = record.get("verb") == "shrink"  # nothing inside is promised to be the same
    pairs = paired(left, right, record) if of_this and left and right and not shrunk else {}
    kept = record.get("outputs", {}) if of_this and shrunk else {}
    stored, difference = new.coarsest, {}
    for dtype in dict.fromkeys((stored, torch.float32)):
        truth, inside = _run(old, left, dtype, inputs, set(pairs.values()))
        got, outside = _run(new, right, dtype, inputs, pairs.keys())
        difference[dtype] = _difference(truth, got, new, kept)
    verb, promised = record.get("verb", "grow"), bool(record.get("lossless"))
    for model, given in [(old, truth), (new, got)][: 1 if promised else 2]:  # in float32
        if not all(x.isfinite().all() for x in given.values()):
            remedy = "look for NaN in its weights; nothing can be compared with it"
            raise refuse(str(model.path), "finite numbers out of the model", "others", remedy)
    largest = torch.stack([x.abs().max() for x in truth.values()]).max().item()
    relative = max(LIMIT[verb], ROUNDING[verb] * torch.finfo(stored).eps)
    most = max(1.0, largest) * relative
    both = ((name, inside[pairs[name]], y) for name, y in outside.items() if pairs[name] in inside)
    apart = (name.removesuffix(".weight") for name, x, y in both if _apart(x, y) > relative)
    agrees = difference[torch.float32] <= most
    beyond = "the last norm or the head" if not agrees and pairs and reaches_the_end(left, pairs) else ""
    agreement = Agreement(
        difference[torch.float32],
        difference[stored],
        str(stored).removeprefix("torch."),
        largest,
        most if promised else None,
        next(apart, beyond),
        () if promised else tuple(record.get("lost", ())),
        "output" if truth.keys() <= set(HEADLESS) else "logit",
        continuations(old, new, text, generate, seed, relative, promised) if generate else None,
    )
    if record and of_this and new.path == Path(dst):  # not in the Hub's cache
        write_figures(new.path, str(agreement))
    return agreement


def _refuse_another_source(old: Checkpoint, new: Checkpoint, record: dict) -> bool:
    """Is the record, if any, about this source? A promise is judged by the source it was made for alone."""
    of_this = bool(record) and record["fingerprint"] == old.fingerprint()
    made_of = old.record().get("fingerprint")
    if not of_this and made_of is not None and made_of == new.fingerprint():  # there and back is both
        raise refuse(
            f"{old.path}, {new.path}", "the source first", "what was made of it first", "swap the two"
        )
    if not record:
        widths = [getattr(model.config, "hidden_size", None) for model in (old, new)]
        return widths[0] == widths[1]
    if record["lossless"] and not of_this:
        raise refuse(
            str(old.path),
            f"the source that {new.path} was made of, {record.get('source')}",
            "other weights or another config.json",
            "name that one",
        )
    return of_this


def _run(
    checkpoint: Checkpoint,
    seen: Model | None,
    dtype: torch.dtype,
    inputs: dict[str, Tensor],
    watched: Iterable[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a model gives, by name and in float64, and what the modules of the watched tensors give, in the
    order in which they do."""
    model, inside = load_model(checkpoint.path, dtype).eval(), {}
    names = {weight: seen.named(name) for name, weight in model.named_parameters()} if seen else {}
    for module in model.modules():  # several may share a weight: the first that runs is kept
        if (named := names.get(getattr(module, "weight", None))) in watched:
            module.register_forward_hook(partial(_keep, inside, named))
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with quiet():
        outputs = model(**given)
    names = [name for name in outputs if "logits" in name] or [name for name in HEADLESS if name in outputs]
    return {name: outputs[name].double() for name in names}, inside


def _keep(inside: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
    """Channels last; what was given first, where it is several times or one of several."""
    output = output[0] if isinstance(output, tuple) else output
    inside.setdefault(name, output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output)


def _difference(
    truth: dict[str, Tensor], got: dict[str, Tensor], new: Checkpoint, kept: dict[str, list[int]]
) -> float:
    """The largest, of all outputs that both give; of hidden states, the channels that the source has, or of
    these the ones that a smaller model kept."""
    found = []
    for name in truth.keys() & got.keys():
        x, y = truth[name], got[name] if "logits" in name else got[name][..., : truth[name].shape[-1]]
        x = x[..., kept[name]] if name in kept else x
        if x.shape != y.shape:
            shape = tuple(got[name].shape)
            raise refuse(str(new.path), f"{name} of shape {tuple(x.shape)}", shape, "compare models alike")
        found.append((y - x).abs().max())
    if not found:
        gives = " and ".join(truth)
        raise refuse(
            str(new.path), f"{gives}, as the source gives", " and ".join(got), "compare models alike"
        )
    return torch.stack(found).max().item()


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest difference of the channels that both have, over the largest number there, at least 1."""
    apart = ((y[..., : x.shape[-1]] - x).abs().max() / x.abs().max().clamp(min=1)).item()
    return math.inf if math.isnan(apart) else apart
