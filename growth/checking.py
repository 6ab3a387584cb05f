"""Do two models agree? The proof behind "lossless"."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from growth.adapters import ADAPTERS
from growth.adapters.table import Adapter
from growth.card import write_figures
from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.loading import load_model

# Of the largest logit. A grown weight of 16 bits is a rounded one: measured, 0.2 to 0.75 eps of the largest
# logit for 3 to 12 layers, so 2 eps are allowed. Transfer only copies.
LIMIT = {"grow": 1e-4, "transfer": 1e-5}
ROUNDING = {"grow": 2.0, "transfer": 0.0}
# What is compared inside: the outputs of what writes to the stream, and of the norms. A unit of the source's
# comes first among its copies, so the first channels are those of the source. Not so the last norm's: a tied
# head counts every copy, so it is divided.
LAYER = ("mixer_norm", "mixer.o", "mlp_norm", "mlp.down")
WATCHED = ("embed.weight", *(f"layers.{{}}.{part}.weight" for part in LAYER))


@dataclass(frozen=True)
class Agreement:
    """max |logit difference| in float32 and in the stored dtype, the largest logit, and what growth.json
    promised.

    limit: the largest difference in float32 that keeps the promise: 1e-4 for grown models, or 2 eps of the
    stored dtype where that is more, 1e-5 for transferred ones, each times the largest logit where that
    exceeds 1; None where equality was not promised. first: where the new model's outputs first differ by more
    than this share: a module, such as layers.2.mlp.down_proj, or "the last norm or the head"; "" where they
    do not.
    """

    float32: float
    stored: float
    stored_dtype: str
    largest: float
    limit: float | None
    first: str = ""

    @property
    def kept(self) -> bool:
        """False when a promised equality fails."""
        return self.limit is None or self.float32 <= self.limit

    def __str__(self) -> str:
        measured = (
            f"max |logit difference|: {self.float32:.2e} in float32, {self.stored:.2e} in "
            f"{self.stored_dtype} (largest logit {self.largest:.2f})"
        )
        where = f"; they first differ in {self.first}" if self.first else ""
        if self.limit is None:
            return f"{measured}{where}; no equality was promised"
        return f"{measured}{where}; promised at most {self.limit:.1e}: {'kept' if self.kept else 'BROKEN'}"


@torch.no_grad()
def check(src: str | Path, dst: str | Path, *, batch: int = 2, length: int = 128, seed: int = 0) -> Agreement:
    """Compare the logits of two language models on `batch` x `length` random tokens.

    src, dst: checkpoints, each a folder or the Hub's; the promise is the one in dst's growth.json, and holds
    for the source whose fingerprint that has. The figures go into dst's README.md where growth made it of src
    and it is a folder. Raises Refusal where one cannot be read, their vocabularies differ, or src is not what
    the promise was made for.
    """
    old, new = Checkpoint(src), Checkpoint(dst)
    V, words = (getattr(model.config, "vocab_size", None) for model in (old, new))
    if not isinstance(V, int):
        raise refuse(str(src), "a language model", f"a {old.config.model_type} without words", "name another")
    if words != V:
        raise refuse(str(dst), f"the source's vocabulary of {V}", words, "compare models of one tokenizer")
    record = new.record()
    of_this = _refuse_another_source(old, new, record)
    positions = (getattr(model.config, "max_position_embeddings", None) for model in (old, new))
    T = min(length, *(most or length for most in positions))
    ids = torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(seed))
    stored, watched = new.coarsest, _watched(old, new, record) if of_this else {}
    difference = {}
    for dtype in dict.fromkeys((stored, torch.float32)):
        truth, inside = _run(old, dtype, ids, watched.values())
        got, outside = _run(new, dtype, ids, watched)
        difference[dtype] = (got - truth).abs().max().item()
    largest, verb = truth.abs().max().item(), record.get("verb", "grow")
    relative = max(LIMIT[verb], ROUNDING[verb] * torch.finfo(stored).eps)
    most = max(1.0, largest) * relative
    apart = (name for name, y in outside.items() if _apart(inside[watched[name]], y) > relative)
    agrees = difference[torch.float32] <= most
    beyond = "the last norm or the head" if not agrees and _to_the_end(old, watched) else ""
    kind, first = str(stored).removeprefix("torch."), next(apart, beyond)
    agreement = Agreement(
        difference[torch.float32],
        difference[stored],
        kind,
        largest,
        most if record.get("lossless") else None,
        first,
    )
    if record and of_this and new.path == Path(dst):  # not in the Hub's cache
        write_figures(new.path, str(agreement))
    return agreement


def _refuse_another_source(old: Checkpoint, new: Checkpoint, record: dict) -> bool:
    """Is the record, if any, about this source? A promise is judged by the source it was made for alone."""
    made_of = old.record().get("fingerprint")
    if made_of is not None and made_of == new.fingerprint():
        raise refuse(
            f"{old.path}, {new.path}", "the source first", "what was made of it first", "swap the two"
        )
    if not record:
        widths = [getattr(model.config, "hidden_size", None) for model in (old, new)]
        return widths[0] == widths[1]
    of_this = record["fingerprint"] == old.fingerprint()
    if record["lossless"] and not of_this:
        raise refuse(
            str(old.path),
            f"the source that {new.path} was made of, {record.get('source')}",
            "other weights or another config.json",
            "name that one",
        )
    return of_this


def _watched(old: Checkpoint, new: Checkpoint, record: dict) -> dict[str, str]:
    """Modules of the new model -> those of the old one that give the same where nothing was lost.

    Layers that were added, or mixed of several, have none.
    """
    adapters = [ADAPTERS.get(model.config.model_type) for model in (old, new)]
    if None in adapters:
        return {}
    left, right = (_modules(adapter, x) for adapter, x in zip(adapters, (old, new), strict=True))
    if not record:
        return {name: left[key] for key, name in right.items() if key in left and len(left) == len(right)}
    keys, pairs = {name: key for key, name in left.items()}, {}
    sources = {row["name"]: row["sources"] for row in record["tensors"]}
    for (part, layer), name in right.items():
        output = right.get(("layers.{}.mixer.o", layer))
        made_of = [adapters[0].named(source) or "" for source in sources.get(f"{name}.weight", ())]
        added = layer is not None and output is not None and not sources.get(f"{output}.weight", ["fresh"])
        key = keys.get(made_of[0].rpartition(".")[0]) if len(made_of) == 1 else None
        if key and key[0] == part and not added:
            pairs[name] = left[key]
    return pairs


def _to_the_end(old: Checkpoint, watched: dict[str, str]) -> bool:
    """Was the last layer compared, so that only what comes after it is left?"""
    adapter = ADAPTERS.get(old.config.model_type)
    last = "layers.{}.mlp.down", old.config.num_hidden_layers - 1
    return adapter is not None and _modules(adapter, old).get(last) in watched.values()


def _modules(adapter: Adapter, checkpoint: Checkpoint) -> dict[tuple[str, int | None], str]:
    """(part, layer) -> the module that has its weight."""
    return {
        (weight.removesuffix(".weight"), layer): name.rpartition(".")[0]
        for name, (entry, layer) in adapter.table(checkpoint.config).items()
        if (weight := entry.weights[0].name) in WATCHED
    }


def _run(
    checkpoint: Checkpoint, dtype: torch.dtype, ids: Tensor, watched: Iterable[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a model in float64, and what the watched modules give, in the order in which they do."""
    model, outputs = load_model(checkpoint.path, dtype).eval(), {}
    for name in set(watched):
        keep = partial(_keep, outputs, name)
        model.get_submodule(name).register_forward_hook(keep)
    return model(input_ids=ids).logits.double(), outputs


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    outputs[name] = output


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest difference of the channels that both have, over the largest number there, at least 1."""
    apart = ((y[..., : x.shape[-1]] - x).abs().max() / x.abs().max().clamp(min=1)).item()
    return math.inf if math.isnan(apart) else apart
