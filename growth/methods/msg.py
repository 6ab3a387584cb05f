"""MSG: new units and layers behind masks that open during training.  Yao et al., ICLR 2024 (2305.02869).

    width   readers take m x of what new units carry; a norm's statistics weigh each by its m
    depth   a new layer gives  m f(x) + (1 - m) x
    m       0 at first, then linearly to 1                    growth.training.masks opens them

Old units stay where they are, with the weights that they had; what is new starts as it does in a new model.
At m = 0 the model is its source, exactly, however the new weights start, norms after the sum (BERT)
included; at m = 1 it is the plain model. The checkpoint holds the plain model: loaded without masks it is
not the source. growth.json says what is new (`closed`), and `growth train` closes and opens that.

Of a BERT whose rate has fallen the rows "msg" and "lemon" of benchmarks/REUSE.md save 53 % and 28 %. On text
and images "msg" does not arrive.

The paper masks what is written, here what is read is masked: the same product for every matrix that reads,
and a norm weighs values that nothing has scaled. Groups among which the heads of an old one are shared out
have copies of its keys and values.
"""

from dataclasses import dataclass
from typing import ClassVar

from growth.architecture import Architecture, Attention, Pointwise
from growth.depth import firsts, rows
from growth.errors import refuse
from growth.maps import Maps, Row, copies
from growth.methods.copying import indices, per_layer, tied_factors, together
from growth.methods.learning import refuse_experts
from growth.methods.ordered import Index, Ordered


@dataclass(frozen=True)
class Msg(Ordered):
    """New units and layers at random, behind masks that growth train opens.  Yao et al., ICLR 2024."""

    name: ClassVar[str] = "msg"

    def layers(self, old: int, new: int) -> Index:
        """The old layer that stands at each place for the first time, or that a new one has its kind from.

        Raises Refusal where the order leaves old layers out or takes them in another order.
        """
        order = super().layers(old, new)
        if [j for j in firsts(order) if j >= 0] != [*range(old)]:
            expected = f"layers 0 to {old - 1}, each first seen after those below it"
            raise refuse("order", expected, ",".join(map(str, order)), "name all of them, from the lowest on")
        return order

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`. Raises Refusal where the new groups of heads do not hold the old,
        and where there are experts."""
        refuse_experts(self.name, old)
        wires = {name: copies(index, old.wires[name]) for name, index in placed(old, new).items()}
        for wire, factor in tied_factors(old, new).items():
            for name in (wire, *(norm.gain for norm in old.norms if norm.writes == wire and norm.gain)):
                index = wires[name].index if name in wires else tuple(range(old.wires[name].units))
                wires[name] = copies(index, old.wires[name], scale=1 / factor)
        return Maps(per_layer(new, wires), self._depth(old, new), fresh=True)

    def _depth(self, old: Architecture, new: Architecture) -> dict[str, tuple[Row, ...]]:
        """New layers are made of none, but for what each unit has of its own."""
        depth = {}
        for prefix, stack in old.stacks.items():
            order = self.layers(stack.layers, new.stacks[prefix].layers)
            for op in (op for ops in stack.blocks.values() for op in ops):
                for weight in op.weights():
                    depth[weight.name] = rows(order if isinstance(op, Pointwise) else firsts(order))
        return depth


def placed(old: Architecture, new: Architecture) -> dict[str, Index]:
    """Of every wire that grows: the old unit that stands at each place, -1 where a new one does.

    Each old unit once, but for keys and values: groups among which old heads are shared out have a copy each.
    """
    index, classes = indices(old, new), together(old)
    found = {name: firsts(of) for name, of in index.items()}
    for op in old.all_ops:
        if not isinstance(op, Attention) or classes[op.value] == classes[op.query]:
            continue
        P, H = (new.wires[wire].units for wire in (op.query, op.key))
        heads = found.get(op.query, tuple(range(P)))
        if missing := {*range(old.wires[op.query].units)} - {*heads}:
            expected = f"groups of heads that hold all of the source's {old.wires[op.query].units}"
            got = f"{H}, which leave out {', '.join(map(str, sorted(missing)))}"
            raise refuse("num-kv-heads", expected, got, "choose others, or more heads")
        held = [any(head >= 0 for head in heads[g * P // H : (g + 1) * P // H]) for g in range(H)]
        for name in index:
            if classes[name] in (classes[op.key], classes[op.value]):
                found[name] = tuple(j if held[g] else -1 for g, j in enumerate(index[name]))
    return found
