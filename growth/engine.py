"""A plan of growth, row by row, and the only loop over the rows of any plan."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from growth import expand
from growth.expand import Copy, Draw, Expand
from growth.families.table import Model
from growth.maps import Drawn, Maps
from growth.plan import Plan, Recipe, Row, Source, dropped

Recipes = Callable[[str], Recipe | None]  # by names on disk; None where the maps make it


def made(plan: Plan, source: Source) -> Iterator[tuple[Row, Iterator[Tensor]]]:
    """Every row with its tensor, in blocks of rows, not rounded yet."""
    for row in plan.rows:
        yield row, row.recipe(source)


def drawn_row(source: Source, name: str, shape: tuple[int, ...], of: Drawn, seed: int) -> Row:
    """A tensor that nothing of the source becomes."""
    dtype, note = source.dtype(source.on_disk.values()), f"normal numbers of deviation {of.std}"
    if not of.std:
        note = "zero: it changes nothing at first"
    elif of.each > 1:
        note += f", each row {of.each} times"
    recipe, block = Draw(shape, of, name, seed), math.prod(shape)
    return Row(name, shape, dtype, "initialised", (), note, recipe=recipe, block=block, drawn=recipe.drawn)


def grown_row(source: Source, name: str, expands: Expand, learned: Recipes | None) -> Row:
    """A tensor that the maps make of the source's, or zeros or ones where they make it of none. learned: as
    plan_growth has it."""
    entry, layer, maps, shape = expands.entry, expands.layer, expands.maps, expands.entry.shape(expands.new)
    used = [source.where(maps.source(w.name), j) for w in entry.weights for j in expands.layers(w)]
    sources, note = tuple(dict.fromkeys(used)), ""
    copied = len(sources) == 1 and all(map(expands.stays, entry.weights))
    if not sources and maps.fresh:
        note = "a new layer"
    elif not sources:
        value = "one" if any(maps.constants.get(entry.weights[0].name, ())) else "zero"
        note = f"{value}: added layers change nothing at first"
    recipe = Copy(sources[0]) if copied else (learned and learned(name)) or expands
    return Row(
        name,
        shape,
        source.dtype(sources or source.tensors(entry.weights) or source.on_disk.values()),
        "copied" if copied else "initialised" if maps.fresh and not sources else "expanded",
        sources,
        note,
        freeze=maps.still is not None and (layer is None or layer in maps.still),
        recipe=recipe,
        block=min(math.prod(shape), expand.BLOCK) if copied or entry.by_rows else math.prod(shape),
        held=max((source.checkpoint.bytes(name) for name in sources), default=0),
        drawn=expands.drawn if recipe is expands else 0,
    )


def plan_growth(
    source: Source,
    target: Model,
    maps: Maps,
    seed: int,
    learned: Recipes | None = None,
) -> Plan:
    """Where every grown tensor comes from, and what makes it.

    learned: the recipes of what is found from data, by names on disk; None where the maps make it.
    """
    old, new, rows = source.model.architecture, target.architecture, []
    for name, (entry, layer) in target.table().items():
        if drawn := maps.drawn.get(entry.weights[0].name):
            rows.append(drawn_row(source, name, entry.shape(new), drawn, seed))
        else:
            recipe = Expand(entry, layer, maps, old, new, seed)
            rows.append(grown_row(source, name, recipe, learned))
    return Plan(tuple(rows), dropped(source, rows))


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks that lie in one core's cache: others gain little, and on a busy machine are waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
