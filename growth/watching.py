"""Where two models have to give the same inside: the outputs of what writes the stream, and of the norms that
blocks read of it.

Of every unit there the first copy is written as it was, and the first units are the source's in order. Not so
elsewhere: a tied head's norm is divided by the copies that the head counts, and new heads stand inside their
groups.
"""

from growth.architecture import STREAM, Linear, Norm
from growth.families.table import Model

Place = tuple[str, float, int | None]  # a weight, what the model multiplies it with, and its layer


def watched(model: Model) -> dict[Place, str]:
    """Place -> the tensor, by its name in the table, whose module gives such an output."""
    stacks = model.architecture.stacks.values()
    inside = [op for stack in stacks for ops in stack.blocks.values() for op in ops]
    read = {op.reads for op in inside if isinstance(op, Linear)}
    names = {
        f"{op.name}.weight"
        for op in model.architecture.all_ops
        if getattr(op, "writes", "") == STREAM
        or (isinstance(op, Norm) and op.reads == STREAM and op.writes in read)
    }
    return {
        (weight.name, weight.scale, layer): name
        for name, (entry, layer) in model.table().items()
        if name.endswith(".weight") and len(entry.weights) == 1
        if (weight := entry.weights[0]).name in names
    }


def paired(old: Model, new: Model, record: dict) -> dict[str, str]:
    """Tensors of the new model -> those of the old one whose modules give the same where nothing was lost.

    record: growth.json's, {} where there is none. Layers that were added, or mixed of several, have no pair.
    """
    left, right = watched(old), watched(new)
    if not record:
        alike = len(left) == len(right)
        return {name: left[place] for place, name in right.items() if alike and place in left}
    named = {*right.values()}
    rows = {row["name"]: row for row in record["tensors"] if row["name"] in named}
    places, found = {name: place for place, name in left.items()}, {}
    stacks = new.architecture.stacks.values()
    after = {f"{op.name}.weight" for stack in stacks for kind in stack.blocks for op in stack.after_sum(kind)}
    blocks = ((stack, ops) for stack in stacks for ops in stack.blocks.values())
    adding = {f"{op.name}.weight" for stack, ops in blocks for op in ops if stack.adds(op)} - after
    added = {
        (_stack(weight), layer)
        for (weight, _, layer), name in right.items()
        if weight in adding and name in rows and not rows[name]["sources"]
        if rows[name].get("origin") == "expanded"  # what a transfer starts fresh is not
    }
    alike = old.family.model_type == new.family.model_type
    for (weight, scale, layer), name in right.items():
        if layer is None and scale != 1 and not alike:
            continue  # one class multiplies within the module that is watched, another behind it
        sources = rows[name]["sources"] if name in rows else ()
        place = places.get(old.named(sources[0])) if len(sources) == 1 else None
        acts = weight in after or (_stack(weight), layer) not in added
        if place and place[:2] == (weight, scale) and acts:
            found[name] = left[place]
    return found


def reaches_the_end(old: Model, pairs: dict[str, str]) -> bool:
    """Was the last layer compared, so that only what comes after it is left?"""
    inside = [name for (_, _, layer), name in watched(old).items() if layer is not None]
    return bool(inside) and inside[-1] in pairs.values()


def _stack(weight: str) -> str:
    """The prefix of a layered weight's stack."""
    return weight.partition("layers.{}.")[0]
