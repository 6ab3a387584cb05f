"""What a model becomes by a method, and what to choose where something would be lost."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace

from transformers import PreTrainedConfig

from growth.depth import firsts
from growth.errors import Refusal, refuse, several
from growth.families.sparse import sparse
from growth.families.table import Model
from growth.lossless import lost
from growth.maps import Maps
from growth.methods import Method
from growth.sizes import FLAGS, Sizes, changed, resized, sizes_of


def target_of(model: Model, wanted: Sizes, method: Method) -> tuple[Model, Method]:
    """What a model becomes, and the method with all that follows from the model.

    Raises Refusal where the method cannot make it, or the model cannot be of these sizes.
    """
    if method.sparse:
        _refuse_sizes(method, wanted)
        return _upcycled(model, method)
    wanted = replace(wanted, layers=method.depth(wanted.layers, model.architecture.layers))
    target = model.family.model(resized(model, wanted, method.layers), model.parts)
    _refuse_other_sizes(method, changed(model, target))
    return target, method.told(model.architecture)


def scale_eps(config: PreTrainedConfig, maps: Maps) -> None:
    """Give a target's configuration the eps that the maps ask for."""
    for name, factor in maps.eps.items():
        setattr(config, name, getattr(config, name) * factor)


def refuse_lossy(old: Model, new: Model, method: Method, losses: list[str], wanted: Sizes) -> Refusal:
    """Of a method that promises to lose nothing, and does: with sizes nearby, where these help."""
    L, M = (model.architecture.layers for model in (old, new))
    if [j for j in firsts(method.layers(L, M)) if j >= 0] != [*range(L)]:
        ways = ["an order that meets every layer of the source in turn, such as 0,1,1,2", "--allow-lossy"]
    else:
        near = _lossless_near(old, new.architecture.wires["residual"].size, method, wanted)
        ways = [*near, "method net2net, which comes close", "--allow-lossy"]
    expected, got = "sizes at which nothing is lost", several(losses)
    return refuse(method.name, expected, got, f"choose {', or '.join(ways)}")


def _refuse_other_sizes(method: Method, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises Refusal where a size would change that the method cannot grow."""
    if others := [size for size in sizes if size not in method.grows]:
        got = ", ".join(f"{size} {sizes[size][0]} -> {sizes[size][1]}" for size in others)
        expected, remedy = f"{' or '.join(sorted(method.grows))} alone to grow", "grow that first, by lemon"
        raise refuse(method.name, expected, got, remedy)


def _upcycled(model: Model, method: Method) -> tuple[Model, Method]:
    """The mixture of experts that a model becomes, and the method with all that was not said."""
    convert = sparse(model, method.format)  # before experts are counted: a family may have no place for any
    known = method.told(model.architecture)
    return convert(known.experts, known.top_k, known.granularity, known.every), known


def _refuse_sizes(method: Method, wanted: Sizes) -> None:
    """Raises Refusal where a size is asked for of a method that leaves sizes as they are."""
    for name, size in asdict(wanted).items():
        if size is not None:
            remedy = "leave it out, and grow the result"
            raise refuse(FLAGS[name], f"none, for {method.name} leaves sizes as they are", size, remedy)


def _lossless_near(model: Model, hidden: int, method: Method, wanted: Sizes) -> list[str]:
    """The least larger heads or width that keep groups whole, else that copy all channels as often; hidden:
    the width that loses something."""
    have, near = sizes_of(model), {}
    if wanted.kv_heads:
        heads = wanted.kv_heads * have.heads // have.kv_heads
        near[f"{heads} heads"] = replace(wanted, heads=heads, hidden=None)
    for whole in (have.hidden // (have.kv_heads or 1), have.hidden):
        if hidden % whole:
            width = (hidden // whole + 1) * whole
            near[f"hidden size {width}"] = replace(wanted, hidden=width, heads=None, kv_heads=None)
    for name, sizes in near.items():
        with suppress(Refusal):
            larger = model.family.model(resized(model, sizes, method.layers), model.parts).architecture
            if not lost(model.architecture, larger, method.maps(model.architecture, larger)):
                return [name]
    return []
