"""Can a recipe run? As far as that is known before anything does: options, files, and sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from growth.checkpoint import Checkpoint, chosen_dtype
from growth.cli.arguments import whole_numbers
from growth.cli.flags import flags, method_with
from growth.errors import Refusal, refuse, refuse_odd_seed, several
from growth.families.table import Model
from growth.fresh import closed
from growth.lossless import lost
from growth.methods import METHODS
from growth.methods.option import refuse_other
from growth.optimizing.policies import refuse_odd_policy
from growth.plan import Source
from growth.recipes.commands import MAKING, Commands, Places
from growth.recipes.recipe import Recipe
from growth.shrinking.keeping import order_of
from growth.shrinking.shrinking import SCORES, refuse_unused
from growth.shrinking.smaller import chosen_layers
from growth.sizes import FLAGS, Sizes, changed, followed, resized
from growth.targets import scale_eps, target_of
from growth.training.dropping import dropping
from growth.training.freeze import transferred
from growth.training.options import LEAST, refuse_odd_options


@dataclass
class State:
    """What is known of the checkpoint that a step reads.

    model: None where that follows from the weights, or another verb's plan. still: what `train --freeze` may
    hold still; None where that is not known. closed: has it masks that training is to open? None likewise.
    """

    model: Model | None
    still: bool | None
    closed: bool | None


def refuse_odd_steps(recipe: Recipe, source: str, commands: Commands) -> list[str]:
    """A line for each step on what it is to do.

    Raises Refusal, with the step's number, where one cannot be served: a verb or an option that is not there,
    a value of another type, a file that is missing, sizes that cannot be grown to from those that the steps
    before give, as far as these are known: behind `transfer` they are not, nor where `shrink` is to choose
    among layers that differ in kind.
    """
    if not any(step.verb in MAKING for step in recipe.steps):
        raise refuse("recipe", "a step that makes a checkpoint", "none", f"add one of {', '.join(MAKING)}")
    checkpoint = Checkpoint(source)
    here = State(Source(checkpoint).model, _held(source), bool(checkpoint.record().get("closed")))
    lines, made = [], False
    for number, step in enumerate(recipe.steps, 1):
        where = f"step {number}, {step.verb}"
        at = Places(source, source, f"{source}.made", source)
        parsed = commands.parsed(where, step, at)
        if step.verb == "check" and not made:
            raise refuse(where, "a step before it that makes a checkpoint", "none", "put it behind one")
        made = made or step.verb in MAKING
        try:
            did = PLANNED.get(step.verb, _unknown)(parsed, here)
        except Refusal as refusal:
            raise Refusal(f"{where}: {refusal}") from refusal
        lines.append(f"{where}: {did}" if did else where)
    return lines


def _held(source: str) -> bool:
    try:
        return bool(transferred(source))
    except Refusal:
        return False


def _grow(given: dict[str, Any], here: State) -> str:
    """As growing.grow plans it, of a configuration alone."""
    options = {name: x for name in flags(METHODS.values()) if (x := given.get(name)) not in (None, [], ())}
    method = method_with(given["method"], options)
    refuse_odd_seed(given["seed"])
    chosen_dtype(given["dtype"])
    refuse_odd_policy(given["policy"], given["optimizer"])
    _refuse_closed(method.name, here)
    old = here.model
    if old is None:
        return _unknown(given, here)
    wanted = Sizes(**{name: given.get(_option(flag)) for name, flag in FLAGS.items() if name != "experts"})
    new, method = target_of(old, wanted, method)
    maps = method.maps(old.architecture, new.architecture, given["seed"])
    if (
        method.lossless
        and not given["allow_lossy"]
        and (losses := lost(old.architecture, new.architecture, maps))
    ):
        remedy = "choose others, or allow-lossy: true"
        raise refuse(method.name, "sizes at which nothing is lost", several(losses), remedy)
    scale_eps(new.config, maps)
    here.model, here.still = new, maps.still is not None
    here.closed = maps.fresh and bool(closed(old.architecture, new.architecture, maps))
    return "; ".join((f"by {method.name}: {_sizes(old, new)}", *followed(old, new, wanted)))


def _shrink(given: dict[str, Any], here: State) -> str:
    """The sizes; which layers stay is known when it has run, and matters where they differ in kind."""
    refuse_odd_seed(given["seed"])
    chosen_dtype(given["dtype"])
    refuse_other("score", given["score"], SCORES)
    _refuse_closed("shrink", here)
    if given["data"] is None and (given["score"] != "magnitude" or given["merge"]):
        raise refuse(
            "data", f"text for score {given['score']} or for merging", "none", "name a file or a folder"
        )
    old = here.model
    if old is None:
        return _unknown(given, here)
    sizes = Sizes(**{name: given[_option(flag)] for name, flag in FLAGS.items()})
    refuse_unused(given["score"], given["data"], sizes)
    layers = None if given["layers"] is None else whole_numbers("layers", given["layers"])
    chosen, sizes = chosen_layers(old, sizes, layers, None)
    new = old.family.model(resized(old, sizes, order_of(chosen), "shrink"), old.parts)
    alike = all(len(set(stack.kinds)) == 1 for stack in old.architecture.stacks.values())
    here.model = new if alike or layers is not None or sizes.layers is None else None
    here.still = here.closed = False
    return "; ".join((f"by {given['score']}: {_sizes(old, new)}", *followed(old, new, sizes)))


def _refuse_closed(what: str, here: State) -> None:
    if here.closed:
        expected, remedy = "a model that was trained since msg made it", "put train before it"
        raise refuse(what, expected, "one whose masks never opened", remedy)


def _sizes(old: Model, new: Model) -> str:
    return ", ".join(f"{name} {before} -> {after}" for name, (before, after) in changed(old, new).items())


def _option(flag: str) -> str:
    return flag.replace("-", "_")


def _train(given: dict[str, Any], here: State) -> str:
    """Options that train refuses."""
    refuse_odd_options(given | {name: x for name, x in LEAST.items() if given[name] is None})
    dropping(given)
    if given["freeze"] and here.still is False:
        remedy = "leave freeze out, or put a method before it that adds layers to be trained alone"
        raise refuse("freeze", "a model of which something is to be held still", "none", remedy)
    if given["masks"] is not None and here.closed is False:
        remedy = "leave masks out, or put method msg before it"
        raise refuse("masks", "a model with masks to open", "none", remedy)
    here.closed = False
    return f"{given['steps']} steps on {given['data']}"


def _check(given: dict[str, Any], here: State) -> str:
    """It makes nothing."""
    return ""


def _unknown(given: dict[str, Any], here: State) -> str:
    """What comes out is known when it is there."""
    if "seed" in given:
        refuse_odd_seed(given["seed"])
    here.model = here.still = here.closed = None
    return ""


PLANNED: dict[str, Callable[[dict[str, Any], State], str]] = {
    "grow": _grow,
    "shrink": _shrink,
    "train": _train,
    "check": _check,
}
