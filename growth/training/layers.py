"""The layers of a network in memory, found by the names that its family's table has."""

from torch import nn

from growth.errors import refuse
from growth.families import FAMILIES, model_of
from growth.families.table import Model


def layers_of(network: nn.Module, what: str) -> dict[str, dict[str, nn.Module]]:
    """Of each stack, by the prefix of its names: the names of its layers' modules -> the modules, in order.

    Raises Refusal in the name of `what` where no family knows the network.
    """
    seen, parameters = seen_in(network, what)
    table, lists = seen.table(), {n for n, x in network.named_modules() if isinstance(x, nn.ModuleList)}
    found: dict[str, dict[int, str]] = {prefix: {} for prefix in seen.architecture.stacks}
    for name in parameters:
        entry, layer = table.get(seen.named(name) or "", (None, None))
        if layer is not None:
            prefix, _ = seen.architecture.stack_of(entry.weights[0].name)
            found[prefix].setdefault(layer, _outermost(name, lists))
    return {
        prefix: {names[i]: network.get_submodule(names[i]) for i in sorted(names)}
        for prefix, names in found.items()
    }


def seen_in(network: nn.Module, what: str) -> tuple[Model, list[str]]:
    """A network seen through its family, and the names of its parameters; a Refusal where none knows it."""
    parameters = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    config = getattr(network, "config", None)
    seen = model_of(config, parameters) if hasattr(config, "model_type") else None
    if seen is None:
        got = getattr(config, "model_type", type(network).__name__)
        raise refuse(what, f"a model of one of: {', '.join(FAMILIES)}", got, "leave it out")
    return seen, parameters


def _outermost(parameter: str, lists: set[str]) -> str:
    """The entry of the outermost list of modules that holds a parameter: a T5's layers hold lists too."""
    parts = parameter.split(".")
    ends = range(1, len(parts))
    end = next(i for i in ends if ".".join(parts[:i]) in lists)
    return ".".join(parts[: end + 1])
