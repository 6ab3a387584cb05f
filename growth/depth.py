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


def with_identities(old: int, new: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Every old layer once, the added ones after it, the upper layers first to receive one.

    Returns the layer that each new layer takes its inside from, the same with -1 where the new layer must add
    nothing to the stream, and the same with -1 where another one follows that takes its inside there too. For
    new <= 2 old this is LEMON's order; beyond, layers receive several.
    """
    each, more = divmod(new - old, old)
    inside, active, last = [], [], []
    for j in range(old):
        added = each + (j >= old - more)
        inside += [j] * (1 + added)
        active += [j] + [-1] * added
        last += [-1] * added + [j]
    return tuple(inside), tuple(active), tuple(last)
