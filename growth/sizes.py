"""How large a model is, and the configuration of a larger one."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig

from growth.architecture import Attention
from growth.checkpoint import LARGEST
from growth.errors import reason, refuse
from growth.families.table import Model
from growth.maps import groups

Order = Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """What a target is to have; None: as the rest asks for.

    hidden     width of the residual stream; default: the source's, or heads x the head size
    layers     default: the source's
    heads      of attention, or of what mixes in its place; default: in proportion to hidden
    kv_heads   heads of keys and values; default: in proportion to heads, or as many as divide them
    ffn        neurons of a feed-forward block; default: in proportion to hidden

    The size of a head never changes, for rotary frequencies and the softmax scale.
    """

    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None


FLAGS = {
    "hidden": "hidden-size",
    "layers": "num-layers",
    "heads": "num-heads",
    "kv_heads": "num-kv-heads",
    "ffn": "ffn-size",
}


def sizes_of(model: Model) -> Sizes:
    """What a checkpoint has."""
    wires, mixing = model.architecture.wires, _mixing(model)
    ffn = next((wire.size for name, wire in wires.items() if name.endswith("ffn.{}")), None)
    heads, kv_heads = (wires[wire].units for wire in (mixing.query, mixing.key)) if mixing else (None, None)
    return Sizes(wires["residual"].size, model.architecture.layers, heads, kv_heads, ffn)


def changed(old: Model, new: Model) -> dict[str, tuple[int, int]]:
    """Every size that differs, by its flag: what it was, what it is; kv heads where there are groups."""
    names = [x.name for x in fields(Sizes) if x.name != "kv_heads" or old.family.fields.kv_heads]
    pairs = {FLAGS[name]: (getattr(sizes_of(old), name), getattr(sizes_of(new), name)) for name in names}
    return {flag: (before, after) for flag, (before, after) in pairs.items() if before != after}


def resized(model: Model, wanted: Sizes, order: Order) -> PreTrainedConfig:
    """The target's configuration: larger, with lists of layers in the order in which a method puts them.

    Raises Refusal where a size is smaller than the source's, does not divide into heads or heads into groups,
    or has no place in the configuration, and where transformers takes no such model.
    """
    have, names, config = sizes_of(model), model.family.fields, model.config
    for size in fields(Sizes):
        got, least = getattr(wanted, size.name), getattr(have, size.name)
        if got is None:
            continue
        if type(got) is not int:
            raise refuse(FLAGS[size.name], "a whole number", repr(got), "give it as an int")
        if least is None:
            raise refuse(FLAGS[size.name], "none, for the model has no such size", got, "leave it out")
        if got < least:
            remedy = "growth never shrinks a model"
            raise refuse(FLAGS[size.name], f"at least the source's {least}", got, remedy)
        if got > LARGEST:
            raise refuse(FLAGS[size.name], f"at most {LARGEST:,}", got, "no machine holds such a model")
    target = copy.deepcopy(config)
    hidden, heads = _width(model, have, wanted)
    setattr(target, names.hidden, hidden)
    if heads is not None:
        setattr(target, names.heads, heads)
        if names.kv_heads:
            setattr(target, names.kv_heads, _groups(have, heads, wanted.kv_heads))
        elif wanted.kv_heads not in (None, heads):
            raise refuse(FLAGS["kv_heads"], f"{heads}, as many as heads", wanted.kv_heads, "leave it out")
        if names.head_dim and hidden != heads * _head(model):
            setattr(target, names.head_dim, _head(model))
    _deepen(model, target, wanted.layers, order)
    for name, value in model.family.resized(config, target).items():
        setattr(target, name, value)
    if have.ffn is not None:
        ffn = wanted.ffn or have.ffn * hidden // have.hidden
        if sizes_of(model.family.model(target, model.parts)).ffn != ffn:  # GPT-2's may follow from the width
            setattr(target, names.ffn, ffn)
    if sizes_of(model.family.model(target, model.parts)) == have:
        remedy = f"pass one of {', '.join(f'--{flag}' for flag in FLAGS.values() if flag != 'num-kv-heads')}"
        raise refuse("target", "something larger than the source", "the same sizes", remedy)
    try:
        target.validate()
    except StrictDataclassClassValidationError as error:
        got, remedy = reason(error.__cause__ or error).rstrip("."), "choose sizes that fit each other"
        raise refuse("target", "sizes that transformers takes", got, remedy) from error
    return target


def _mixing(model: Model) -> Attention | None:
    """Softmax attention, if there is any."""
    ops, queries = model.architecture.all_ops, {f"{prefix}query.{{}}" for prefix in model.architecture.stacks}
    return next((op for op in ops if isinstance(op, Attention) and op.query in queries), None)


def _head(model: Model) -> int:
    return model.architecture.wires[_mixing(model).query].width


def _width(model: Model, have: Sizes, wanted: Sizes) -> tuple[int, int | None]:
    """Width and heads of the target."""
    if have.heads is None:
        return wanted.hidden or have.hidden, None
    head, tight = _head(model), have.heads * _head(model) == have.hidden
    hidden = wanted.hidden or (wanted.heads * head if wanted.heads and tight else have.hidden)
    if tight and hidden % head and not (wanted.heads and model.family.fields.head_dim):
        below = hidden // head * head
        fit = [below, below + head] if below > have.hidden else [below + head]
        raise refuse(
            FLAGS["hidden"],
            f"a multiple of the head size {head}",
            hidden,
            f"choose {' or '.join(map(str, fit))}"
            + (", or give --num-heads" if model.family.fields.head_dim else ""),
        )
    if tight and not model.family.fields.head_dim and wanted.heads not in (None, hidden // head):
        raise refuse(
            FLAGS["heads"],
            f"{hidden // head}, which is hidden-size {hidden} / head size {head}",
            wanted.heads,
            "leave it out, or choose hidden-size to fit",
        )
    in_proportion, rest = divmod(have.heads * hidden, have.hidden)
    if rest and not tight and wanted.heads is None:
        in_proportion = have.heads
    return hidden, wanted.heads or in_proportion


def _groups(have: Sizes, heads: int, wanted: int | None) -> int:
    """Heads of keys and values: groups as the source has them, else the fewest that divide the heads and hold
    every head of the source."""
    if wanted is not None:
        if heads % wanted:
            choices = [n for n in range(have.kv_heads, heads + 1) if heads % n == 0]
            remedy = f"choose {', '.join(map(str, choices))}"
            raise refuse(FLAGS["kv_heads"], f"a divisor of the {heads} heads", wanted, remedy)
        return wanted
    return groups(have.heads, have.kv_heads, heads)


def _deepen(model: Model, target: PreTrainedConfig, wanted: int | None, order: Order) -> None:
    """Layers, and the lists with an entry for each."""
    family, names = model.family, model.family.fields.layers
    L = model.architecture.layers
    moved = order(L, wanted or L)
    if moved == tuple(range(L)):
        return
    depths = [stack.layers for stack in model.architecture.stacks.values()]
    if len(set(depths)) > 1:
        got = " and ".join(map(str, depths))
        raise refuse(FLAGS["layers"], "stacks of as many layers", got, "grow the width alone")
    for stack in model.architecture.stacks.values():
        if left := {*stack.kinds} - {stack.kinds[j] for j in moved}:
            got, remedy = ",".join(map(str, moved)), f"name one of kind {min(left)} too"
            raise refuse("order", "a layer of each kind", got, remedy)
    if family.numbered and getattr(model.config, family.numbered):
        raise refuse(
            FLAGS["layers"],
            f"the source's {L}, for a layer's number enters its attention ({family.numbered})",
            wanted or ",".join(map(str, moved)),
            "grow the width alone",
        )
    for name in names:
        setattr(target, name, len(moved))
    for name in family.lists:
        entries = getattr(model.config, name)
        if entries is not None:
            listed = [entries[j] for j in moved]
            setattr(target, name, "".join(listed) if isinstance(entries, str) else listed)
    for name in family.layer_numbers:
        if (listed := getattr(model.config, name)) is not None:
            setattr(target, name, [i for i, j in enumerate(moved) if j in listed])


def recorded(sizes: Sizes) -> dict[str, int | None]:
    """As growth.json has them: by the names of the flags."""
    return {FLAGS[name].replace("-", "_"): size for name, size in asdict(sizes).items()}
