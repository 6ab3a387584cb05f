"""How large a model is, and the configuration of a larger or a smaller one."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Literal

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig

from growth.architecture import Attention
from growth.configuration import LARGEST
from growth.errors import reason, refuse
from growth.families.table import Model
from growth.maps import groups, may_keep

Order = Callable[[int, int], tuple[int, ...]]
Direction = Literal["grow", "shrink"]


@dataclass(frozen=True)
class Sizes:
    """What a target is to have; None: as the rest asks for.

    hidden     width of the residual stream; default: the source's, or heads x the head size, but for a model
               that shrinks and may have fewer heads than fill its width
    layers     default: the source's
    heads      of attention, or of what mixes in its place; default: in proportion to hidden
    kv_heads   heads of keys and values; default: in proportion to heads, or as many as divide them
    ffn        neurons of a feed-forward block; default: in proportion to hidden
    experts    of each mixture, where a model that has some shrinks; no more count for a token than are left

    The size of a head never changes, for rotary frequencies and the softmax scale.
    """

    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    experts: int | None = None


FLAGS = {
    "hidden": "hidden-size",
    "layers": "num-layers",
    "heads": "num-heads",
    "kv_heads": "num-kv-heads",
    "ffn": "ffn-size",
    "experts": "experts",
}
GROWN = tuple(flag for flag in FLAGS.values() if flag not in ("num-kv-heads", "experts"))  # each by itself


def sizes_of(model: Model) -> Sizes:
    """What a checkpoint has."""
    wires, mixing = model.architecture.wires, _mixing(model)
    ffn = next((wire.size for name, wire in wires.items() if name.endswith("ffn.{}")), None)
    heads, kv_heads = (wires[wire].units for wire in (mixing.query, mixing.key)) if mixing else (None, None)
    experts = wires["experts.{}"].units if "experts.{}" in wires else None
    return Sizes(wires["residual"].size, model.architecture.layers, heads, kv_heads, ffn, experts)


def chosen_sizes(sizes: Sizes | None, short: Sizes) -> Sizes:
    """Those given, or in short form; a refusal where both are."""
    if not isinstance(sizes, Sizes | None):
        raise refuse("sizes", "growth.Sizes", repr(sizes), "such as Sizes(hidden=768)")
    if sizes is not None and short != Sizes():
        raise refuse("sizes", "Sizes, or the short forms", "both", "leave one out")
    return sizes or short


def changed(old: Model, new: Model) -> dict[str, tuple[int, int]]:
    """Every size that differs, by its flag: what it was, what it is, 0 for none; kv heads where there are
    groups."""
    names = [x.name for x in fields(Sizes) if x.name != "kv_heads" or old.family.fields.kv_heads]
    pairs = {
        FLAGS[name]: (getattr(sizes_of(old), name) or 0, getattr(sizes_of(new), name) or 0) for name in names
    }
    return {flag: (before, after) for flag, (before, after) in pairs.items() if before != after}


def followed(old: Model, new: Model, wanted: Sizes) -> tuple[str, ...]:
    """A line on each size that nobody asked for, and that is not as the others are to each other."""
    have, is_now, lines = sizes_of(old), sizes_of(new), []
    both = have.heads and is_now.heads  # layers that go may have been the only ones with heads
    if wanted.heads is None and both and is_now.heads * have.hidden != have.heads * is_now.hidden:
        lines.append(
            f"num-heads: {is_now.heads}, for {have.heads} x {is_now.hidden} / {have.hidden} is no whole "
            "number; --num-heads chooses"
        )
    stay = [op for op in _grouped(old) if op.query in new.architecture.wires]
    lines += dict.fromkeys(filter(None, (_regrouped(old, new, op, wanted) for op in stay)))
    counts = [getattr(x.config, "num_experts_per_tok", None) for x in (old, new)]
    if wanted.experts is not None and counts[0] != counts[1]:
        lines.append(f"experts: {counts[1]} count for a token instead of {counts[0]}, as many as are left")
    return tuple(lines)


def _grouped(model: Model) -> list[Attention]:
    return [op for op in model.architecture.all_ops if isinstance(op, Attention)]


def _regrouped(old: Model, new: Model, op: Attention, wanted: Sizes) -> str:
    """Where heads do not divide into groups as large as the source's: what they became, what keeps them."""
    (Q, G), (P, H) = _heads_of(old, op), _heads_of(new, op)
    ours = _mixing(old) and op.query == _mixing(old).query
    if H == G or P // H == Q // G or (ours and wanted.kv_heads is not None):
        return ""
    ways = []
    if ours:
        ways.append("--num-kv-heads chooses")
    if whole := _whole_groups(old, op, P, wanted):
        ways.append(f"{whole} keeps groups of {Q // G}")
    name = FLAGS["kv_heads"] if ours else op.key.removesuffix(".{}")
    return f"{name}: {H} for {P} heads, where the source has {G} for {Q}; {', '.join(ways)}"


def _heads_of(model: Model, op: Attention) -> tuple[int, int]:
    """Of queries, and of keys and values."""
    wires = model.architecture.wires
    return wires[op.query].units, wires[op.key].units


def _whole_groups(old: Model, op: Attention, heads: int, wanted: Sizes) -> str | None:
    """The flag and the size beyond so many heads at which groups are as large as the source's, if any."""
    (Q, G), width = _heads_of(old, op), old.architecture.wires[op.query].width
    group = Q // G
    whole = heads // group * group if heads < Q else (heads // group + 1) * group
    if not whole:
        return None
    by_width = wanted.heads is None and Q * width == sizes_of(old).hidden
    return f"--hidden-size {whole * width}" if by_width else f"--num-heads {whole}"


def resized(model: Model, wanted: Sizes, order: Order, direction: Direction = "grow") -> PreTrainedConfig:
    """The target's configuration: larger, or in the other direction smaller, with lists of layers in the
    order in which a method puts them.

    Raises Refusal where a size lies on the other side of the source's, does not divide into heads or heads
    into groups, or has no place in the configuration, and where transformers takes no such model.
    """
    have, names, config = sizes_of(model), model.family.fields, model.config
    for size in fields(Sizes):
        _refuse_odd(FLAGS[size.name], getattr(wanted, size.name), getattr(have, size.name), direction)
    target = copy.deepcopy(config)
    hidden, heads = _width(model, have, wanted, direction)
    setattr(target, names.hidden, hidden)
    if heads is not None:
        setattr(target, names.heads, heads)
        if names.kv_heads:
            setattr(target, names.kv_heads, _groups(have, heads, wanted.kv_heads))
        elif wanted.kv_heads not in (None, heads):
            raise refuse(FLAGS["kv_heads"], f"{heads}, as many as heads", wanted.kv_heads, "leave it out")
        if names.head_dim and hidden != heads * _head(model):
            setattr(target, names.head_dim, _head(model))
    _deepen(model, target, wanted.layers, order, direction)
    if wanted.experts is not None:
        target.num_experts = wanted.experts
        target.num_experts_per_tok = min(config.num_experts_per_tok, wanted.experts)
    for name, value in model.family.resized(config, target).items():
        setattr(target, name, value)
    if have.ffn is not None:
        ffn = wanted.ffn or have.ffn * hidden // have.hidden
        if sizes_of(model.family.model(target, model.parts)).ffn != ffn:  # GPT-2's may follow from the width
            setattr(target, names.ffn, ffn)
    if sizes_of(model.family.model(target, model.parts)) == have:
        flags = GROWN if direction == "grow" else FLAGS.values()
        remedy = f"pass one of {', '.join(f'--{flag}' for flag in flags)}"
        remedy += ", or --order" if direction == "grow" else ", or --layers"
        other = {"grow": "larger", "shrink": "smaller"}[direction]
        raise refuse("target", f"something {other} than the source", "the same sizes", remedy)
    try:
        target.validate()
    except StrictDataclassClassValidationError as error:
        got, remedy = reason(error.__cause__ or error).rstrip("."), "choose sizes that fit each other"
        raise refuse("target", "sizes that transformers takes", got, remedy) from error
    return target


def _refuse_odd(flag: str, got: int | None, have: int | None, direction: Direction) -> None:
    """Raises Refusal where a size that is wanted is none, or not on this side of the one that is there."""
    if got is None:
        return
    if type(got) is not int:
        raise refuse(flag, "a whole number", repr(got), "give it as an int")
    if have is None:
        raise refuse(flag, "none, for the model has no such size", got, "leave it out")
    if direction == "shrink" and not 0 < got <= have:
        expected, remedy = f"1 to the source's {have}", "growth grow makes a model larger"
        raise refuse(flag, expected, got, remedy if got > have else "choose a number in between")
    if direction == "grow" and flag == "experts" and got != have:
        raise refuse(flag, f"the source's {have}", got, "method upcycle makes more of them")
    if direction == "grow" and got < have:
        raise refuse(flag, f"at least the source's {have}", got, "growth shrink makes a model smaller")
    if got > LARGEST:
        raise refuse(flag, f"at most {LARGEST:,}", got, "no machine holds such a model")


def _mixing(model: Model) -> Attention | None:
    """Softmax attention, if there is any."""
    ops, queries = model.architecture.all_ops, {f"{prefix}query.{{}}" for prefix in model.architecture.stacks}
    return next((op for op in ops if isinstance(op, Attention) and op.query in queries), None)


def _head(model: Model) -> int:
    return model.architecture.wires[_mixing(model).query].width


def _width(model: Model, have: Sizes, wanted: Sizes, direction: Direction) -> tuple[int, int | None]:
    """Width and heads of the target."""
    if have.heads is None:
        return wanted.hidden or have.hidden, None
    head, tight = _head(model), have.heads * _head(model) == have.hidden
    fills = tight and not (direction == "shrink" and model.family.fields.head_dim)
    hidden = wanted.hidden or (wanted.heads * head if wanted.heads and fills else have.hidden)
    if tight and hidden % head and not (wanted.heads and model.family.fields.head_dim):
        below = hidden // head * head
        inside = range(head, have.hidden + 1) if direction == "shrink" else range(have.hidden + 1, LARGEST)
        fit = [width for width in (below, below + head) if width in inside]
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
    """Heads of keys and values: see growth.maps.groups."""
    if wanted is not None:
        if heads < have.heads or wanted < have.kv_heads:
            _refuse_odd_groups(have, heads, wanted)
        if heads % wanted:
            choices = [n for n in range(have.kv_heads, heads + 1) if heads % n == 0]
            remedy = f"choose {', '.join(map(str, choices))}"
            raise refuse(FLAGS["kv_heads"], f"a divisor of the {heads} heads", wanted, remedy)
        return wanted
    return groups(have.heads, have.kv_heads, heads)


def _refuse_odd_groups(have: Sizes, heads: int, wanted: int) -> None:
    """Raises Refusal where fewer groups are neither some of the source's nor means of as many of them."""
    choices = [n for n in range(1, have.kv_heads + 1) if may_keep((have.heads, heads), (have.kv_heads, n))]
    if wanted not in choices:
        expected = f"some of the {have.kv_heads} groups, or a number that divides them, for {heads} heads"
        raise refuse(FLAGS["kv_heads"], expected, wanted, f"choose {', '.join(map(str, choices))}")


def _deepen(
    model: Model, target: PreTrainedConfig, wanted: int | None, order: Order, direction: Direction
) -> None:
    """Layers, and the lists with an entry for each."""
    family, names = model.family, model.family.fields.layers
    L = model.architecture.layers
    moved = order(L, wanted or L)
    if moved == tuple(range(L)):
        return
    depths = [stack.layers for stack in model.architecture.stacks.values()]
    if len(set(depths)) > 1:
        got = " and ".join(map(str, depths))
        raise refuse(FLAGS["layers"], "stacks of as many layers", got, "change the width alone")
    for stack in model.architecture.stacks.values() if direction == "grow" else ():
        if left := {*stack.kinds} - {stack.kinds[j] for j in moved}:
            got, remedy = ",".join(map(str, moved)), f"name one of kind {min(left)} too"
            raise refuse("order", "a layer of each kind", got, remedy)
    if family.numbered and getattr(model.config, family.numbered):
        raise refuse(
            FLAGS["layers"],
            f"the source's {L}, for a layer's number enters its attention ({family.numbered})",
            wanted or ",".join(map(str, moved)),
            "change the width alone",
        )
    config = copy.deepcopy(model.config)
    for name, value in family.spelled(config).items():
        setattr(config, name, value)
        setattr(target, name, value)
    for name in names:
        setattr(target, name, len(moved))
    for name in family.lists:
        entries = getattr(config, name)
        if entries is not None:
            listed = [entries[j] for j in moved]
            setattr(target, name, "".join(listed) if isinstance(entries, str) else listed)
    for name in family.layer_numbers:
        if (listed := getattr(config, name)) is not None:
            setattr(target, name, [i for i, j in enumerate(moved) if j in listed])


def recorded(sizes: Sizes) -> dict[str, int | None]:
    """As growth.json has them: by the names of the flags."""
    return {FLAGS[name].replace("-", "_"): size for name, size in asdict(sizes).items()}
