"""Which old layer each new layer is made of."""

from growth.maps import Row


def rows(order: tuple[int, ...]) -> tuple[Row, ...]:
    """Row i is one-hot at order[i]; -1 gives an empty row."""
    return tuple(((j, 1.0),) if j >= 0 else () for j in order)


def stacked(old: int, new: int) -> tuple[int, ...]:
    """0 1 2 0 1 2: the whole model again on top of itself."""
    return tuple(i % old for i in range(new))


def interpolated(old: int, new: int) -> tuple[int, ...]:
    """0 0 1 1 2 2: every layer next to its copies."""
    return tuple(i * old // new for i in range(new))


def with_identities(old: int, new: int) -> tuple[int, ...]:
    """0 1 1 2 2: every old layer, then those that are added beside it, the upper layers first to receive one.

    For new <= 2 old this is LEMON's order; beyond, layers receive several.
    """
    each, more = divmod(new - old, old)
    return tuple(j for j in range(old) for _ in range(1 + each + (j >= old - more)))


def firsts(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order with -1 where an old layer stands again: such a layer is to add nothing to the stream."""
    return tuple(j if j not in order[:i] else -1 for i, j in enumerate(order))


def added(order: tuple[int, ...]) -> bool:
    """Does any old layer stand again?"""
    return len(set(order)) < len(order)


def originals(order: tuple[int, ...]) -> frozenset[int]:
    """The layers of the target where an old layer stands for the first time."""
    return frozenset(i for i, j in enumerate(order) if j not in order[:i])


def ends(order: tuple[int, ...]) -> tuple[int, ...]:
    """At the end of each old layer and of those behind it that stand again, that layer; -1 elsewhere."""
    active, found, last = firsts(order), [], -1
    for i, j in enumerate(active):
        last = j if j >= 0 else last
        found.append(last if active[i + 1 : i + 2] != (-1,) else -1)
    return tuple(found)
