"""What every method can be told of depth: which old layer each new layer is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

from growth.depth import with_identities
from growth.errors import refuse
from growth.methods.method import Method
from growth.methods.option import option, refuse_other_types

Index = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ordered(Method):
    """order: the old layer of each new one, such as (0, 1, 1, 2), or "0,1,1,2"; default: the method's own."""

    order: Index | None = option(None, "the old layer of each new one, such as 0,1,1,2", str)

    def __post_init__(self):
        refuse_other_types(self)
        object.__setattr__(self, "order", layer_numbers("order", self.order))

    def arranged(self, old: int, new: int) -> Index:
        """The method's own order."""
        return with_identities(old, new)

    def layers(self, old: int, new: int) -> Index:
        """The old layer that each of `new` layers takes its inside from.

        Raises Refusal where the order that was given names a layer that is not there, or not one for each.
        """
        if self.order is None:
            return self.arranged(old, new)
        refuse_absent("order", self.order, old)
        if len(self.order) != new:
            got = f"{len(self.order)}, {','.join(map(str, self.order))}"
            raise refuse("order", f"a layer for each of the {new}", got, "leave num-layers out")
        return self.order

    def depth(self, wanted: int | None, old: int) -> int | None:
        """The layers of the target of a source of `old`, where the order says how many.

        Raises Refusal where the order names a layer that is not there.
        """
        if self.order is None:
            return wanted
        refuse_absent("order", self.order, old)
        return len(self.order) if wanted is None else wanted


def layer_numbers(name: str, given: str | Sequence[int] | None) -> Index | None:
    """Layer numbers, in words or not; None where none were given. Raises Refusal where they are none."""
    if given is None:
        return None
    words, number = (given.split(","), int) if isinstance(given, str) else (given, index)
    try:
        found = tuple(number(word) for word in words)
    except (TypeError, ValueError):
        found = ()
    if not found or min(found) < 0:
        raise refuse(name, "layer numbers such as 0,1,1,2", repr(given), "separate them by commas")
    return found


def refuse_absent(name: str, order: Index, old: int) -> None:
    """Raises Refusal where a layer is named that the source has not."""
    if absent := [j for j in order if j >= old]:
        expected = f"layers from 0 to {old - 1}"
        raise refuse(name, expected, ", ".join(map(str, absent)), "name layers that the source has")
