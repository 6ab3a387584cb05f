"""What a checkpoint is made of, and what growth can do with it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PreTrainedConfig,
)

from growth.architecture import Wire
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.families.sparse import BECOMES
from growth.families.table import Model
from growth.lossless import lost
from growth.methods.lemon import Lemon
from growth.methods.upcycle import Upcycle, mixture_of
from growth.plan import Source
from growth.sizes import FLAGS, Sizes, resized, sizes_of
from growth.targets import target_of
from growth.transferring.sources import lci_config, pattern_of, said_by
from growth.transferring.xatl import LETTERS

LEMON, UPCYCLE = Lemon(), Upcycle()
TRAINED = {
    AutoModelForCausalLM: "on windows of text",
    AutoModelForMaskedLM: "on windows of text, masked anew for every batch",
    AutoModelForImageClassification: "on images and their classes, from Python",
}


@dataclass(frozen=True)
class Held:
    """A tensor on disk, and the weights in it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """What one size can grow to.

    to: the sizes, or why there are none. lossless: of some that were tried, what lemon loses there.
    """

    size: str
    have: int
    to: str
    lossless: dict[str, list[str]]

    def __str__(self) -> str:
        kept = [tried for tried, losses in self.lossless.items() if not losses]
        parts = [f"lossless at {' and '.join(kept)}"] if kept else []
        parts += [f"not at {tried}: {'; '.join(losses)}" for tried, losses in self.lossless.items() if losses]
        return f"{self.size} {self.have} {self.to}" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class Inspection:
    """A checkpoint: its family, tensors and wires, and what each verb does with it, or why it does not.

    auto: the class of transformers that loads it. parts: what it has of what its family may have. layers: of
    each stack, by its prefix.
    """

    source: str
    family: str
    auto: str
    parts: tuple[str, ...]
    layers: dict[str, int]
    parameters: int
    tensors: tuple[Held, ...]
    wires: dict[str, Wire]
    grow: tuple[Way, ...]
    shrink: str
    transfer: str
    train: str

    def lines(self) -> Iterator[str]:
        """All of it, to be read."""
        layers = " and ".join(map(str, self.layers.values()))
        yield f"{self.source}: {self.family}, {layers} layers, {len(self.tensors)} tensors"
        parts = f" with {', '.join(self.parts)}" if self.parts else ""
        yield f"{self.auto}{parts}, {self.parameters:,} parameters"
        wide = max(len(held.name) for held in self.tensors)
        for held in self.tensors:
            shape = "x".join(map(str, held.shape))
            weights = ", ".join(held.weights).replace("{}", "*")
            yield f"{held.name:{wide}}  {shape:12} {held.dtype:9} {weights}"
        wide = max(map(len, self.wires))
        for name, wire in self.wires.items():
            each = f" of {wire.width}" if wire.width > 1 else ""
            fixed = " (fixed)" if wire.fixed else ""
            yield f"wire {name.replace('{}', '*'):{wide}}  {wire.units}{each}{fixed}"
        for way in self.grow:
            yield f"grow: {way}"
        yield f"shrink: {self.shrink}"
        yield f"transfer: {self.transfer}"
        yield f"train: {self.train}"

    def json(self) -> dict:
        """All of it, as JSON has it."""
        return asdict(self) | {"wires": {name: wire._asdict() for name, wire in self.wires.items()}}


def inspect(src: str | Path) -> Inspection:
    """Look at the checkpoint `src`, a folder or the Hub's.

    Raises Refusal where it cannot be read, or its tensors are not those of its family.
    """
    checkpoint = Checkpoint(src)
    source = Source(checkpoint)
    model, family = source.model, source.family.model_type
    tensors = tuple(
        Held(
            disk := source.on_disk[name],
            checkpoint.shape(disk),
            str(checkpoint.dtype(disk)).removeprefix("torch."),
            tuple(weight.name for weight in entry.weights),
        )
        for name, (entry, _) in source.table.items()
    )
    return Inspection(
        str(src),
        family,
        model.auto.__name__,
        tuple(sorted(model.parts)),
        {prefix: stack.layers for prefix, stack in model.architecture.stacks.items()},
        source.parameters,
        tensors,
        dict(model.architecture.wires),
        tuple(_ways(model)),
        _fewer(model),
        _transferred(checkpoint.config, src),
        TRAINED.get(
            model.auto,
            f"no: only language models and image classifiers are, and this is an {model.auto.__name__}",
        ),
    )


def _transferred(config: PreTrainedConfig, src: str | Path) -> str:
    """What the source's layers can become, or why they cannot."""
    try:
        said_by(config, str(src))
        lci_config(config, own := pattern_of(config), "float32")
    except Refusal as refusal:
        return f"no: {refusal}"
    to, why = [], []
    for name, letter in LETTERS.items():
        if letter == "A":
            continue
        try:
            lci_config(config, letter * len(own), "float32")
            to.append(name)
        except Refusal as refusal:
            why.append(f"; not to {name}: {refusal}")
    return f"to {', '.join(to)}, or a pattern of these with what the layers are now ({own}){''.join(why)}"


def _fewer(model: Model) -> str:
    """What there may be fewer of."""
    sizes = {flag: getattr(sizes_of(model), name) for name, flag in FLAGS.items()}
    names = {flag: flag.removeprefix("num-").replace("-", " ") for flag in sizes}
    found = (f"{names[flag]} below {have}" for flag, have in sizes.items() if have and have > 1)
    return f"to {', '.join(found)}"


def _ways(model: Model) -> Iterator[Way]:
    """Each size by itself, by trying."""
    have = sizes_of(model)
    D, H, G, L, F = have.hidden, have.heads, have.kv_heads, have.layers, have.ffn
    step = next((step for step in range(1, D + 1) if _fits(model, Sizes(D + step))), D)
    to = "to any number above"
    if step > 1:
        to = f"to any multiple of {'the head size ' if H and step == D // H else ''}{step} above it"
    if step > 1 and H and _fits(model, Sizes(D + 1, heads=H)):
        to += ", or to any number above where the heads are given"
    yield _way(model, "hidden size", D, to, {str(T): Sizes(T) for T in (D + step, 2 * D)})
    if H:
        n = H // G
        alone = model.family.fields.head_dim and _fits(model, Sizes(D, heads=H + n))
        width = D if alone else None  # where the heads divide it, in transformers or in its class
        to = "to any number above" + ("" if alone else ", the width with them")
        yield _way(model, "heads", H, to, {str(T): Sizes(width, heads=T) for T in (H + 1, H + n)})
    if H and model.family.fields.kv_heads:
        groups = {
            f"{G + 1} groups of {n}": Sizes(width, heads=H + n, kv_heads=G + 1),
            f"{G} groups of {n + 1}": Sizes(width, heads=H + G, kv_heads=G),
        }
        yield _way(model, "kv heads", G, "to any divisor of the heads above", groups)
    yield _way(model, "layers", L, "to any number above", {str(L + 1): Sizes(layers=L + 1)})
    if F:
        yield _way(model, "ffn size", F, "to any number above", {str(F + 1): Sizes(ffn=F + 1)})
    if model.family.model_type in BECOMES:
        yield _experts(model)


def _experts(model: Model) -> Way:
    """What upcycle makes of it, or why it does not."""
    have = mixture_of(model.architecture)
    experts = len(have.neurons) if have else 0
    try:
        target = target_of(model, Sizes(), UPCYCLE)[0].family.model_type
    except Refusal as refusal:
        return Way("experts", experts, f"do not grow: {refusal}", {})
    to = f"to any multiple of {experts}, by upcycle" if have else f"to any number, as {target}, by upcycle"
    return Way("experts", experts, to, {})


def _way(model: Model, size: str, have: int, to: str, wanted: dict[str, Sizes]) -> Way:
    """With what lemon loses at the sizes that are wanted, or why none of them can be had."""
    old, found, why = model.architecture, {}, ""
    for name, sizes in wanted.items():
        try:
            new = _resized(model, sizes).architecture
        except Refusal as refusal:
            why = str(refusal)
        else:
            found[name] = lost(old, new, LEMON.maps(old, new))
    return Way(size, have, to if found else f"does not grow by itself: {why}", found)


def _fits(model: Model, sizes: Sizes) -> bool:
    try:
        return bool(_resized(model, sizes))
    except Refusal:
        return False


def _resized(model: Model, sizes: Sizes) -> Model:
    return model.family.model(resized(model, sizes, LEMON.layers), model.parts)
