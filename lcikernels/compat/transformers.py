"""transformers' models on this package's kernels, without changing a line of them.

    from lcikernels.compat.transformers import patch

    patch()                 # until unpatch(), or within the block of `with patch():`

transformers writes each function that has a fast kernel somewhere in plain torch, and puts a wrapper around
it that calls the kernel's package instead where that was installed when the model's module was imported.
`patch()` hands these wrappers our functions. The wrappers stay, and with them whoever holds one, models that
exist too, and what they do beside: torch.export gets the plain torch, keywords that a function does not have
are left out.

`python -m lcikernels.compat.transformers` prints what is patched in which models, and what is not and why.
"""

import inspect
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial, wraps
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import NamedTuple

from torch import nn
from torch.compiler import is_compiling, is_exporting

from lcikernels.compat import causal_conv1d, mamba_ssm

TESTED = ("5.24", "5.25")  # transformers from the first on, before the second
NORM_SIZES = {"hidden_size", "eps", "group_size", "n_groups", "norm_before_gate"}
DECORATOR = "use_kernel_func_from_hub_with_fallback"


def any_activation(function: Callable) -> Callable:
    """`function`; an `activation` that only transformers knows is applied to its result."""
    place = list(inspect.signature(function).parameters).index("activation")

    @wraps(function)
    def run(*args, **kwargs):
        if unfinished and not is_compiling():  # their modules are whole now: this is the first call
            modules, unfinished[:] = unfinished[:], []  # pop() would fail in the second of two threads
            for names in modules:
                give_norms(names)
        activation = args[place] if place < len(args) else kwargs.get("activation")
        if activation in (None, "silu", "swish"):
            return function(*args, **kwargs)
        from transformers.activations import ACT2FN

        if place < len(args):
            args = (*args[:place], None, *args[place + 1 :])
        else:
            kwargs = {**kwargs, "activation": None}
        return ACT2FN[activation](function(*args, **kwargs))

    return run


# The names that transformers looks kernels up by, and what computes them here.
SERVED: dict[str, Callable] = {
    "causal_conv1d_fn": any_activation(causal_conv1d.causal_conv1d_fn),
    "causal_conv1d_update": any_activation(causal_conv1d.causal_conv1d_update),
    "selective_scan_fn": mamba_ssm.selective_scan_fn,
    "selective_state_update": mamba_ssm.selective_state_update,
    "mamba_chunk_scan_combined": mamba_ssm.mamba_chunk_scan_combined,
}
SCANS = {"selective_scan_fn", "mamba_chunk_scan_combined"}
# Layers as one function. transformers' own gives None, and the model goes on to the functions above; but
# first it refuses packed sequences, and tells to install mamba_ssm, until its wrapper takes it for a kernel.
FUSED = "it is not told of {}, so a model calls the functions above one by one"
SPLIT: dict[str, str] = {
    "mamba_inner_fn": FUSED.format("the activation and of padding"),
    "mamba_split_conv1d_scan_combined": FUSED.format("padding"),
}
LEFT: dict[str, str] = {
    **SPLIT,
    "chunk_gated_delta_rule": "there is no delta rule here",
    "fused_recurrent_gated_delta_rule": "there is no delta rule here",
    "chunk_kda": "there is no delta rule here",
    "fused_recurrent_kda": "there is no delta rule here",
}


undo: list[Callable[[], None]] = []  # what puts back what patch() has replaced, latest last
unfinished: list[dict[str, object]] = []  # modules that were about to define a norm when they were patched


class Patched:
    """What `patch()` returns: as a context it undoes on leaving what that call did."""

    def __init__(self, ours: bool):
        self.ours = ours

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *error) -> None:
        if self.ours:
            unpatch()


def patch() -> Patched:
    """Let transformers' models compute with this package's kernels: those that exist and those to come.

    A second call does nothing. `unpatch()` undoes it whatever the number of calls; `with patch():` does so at
    the end of the outermost block. Where transformers is outside the range that this was tested with, a
    UserWarning says so and everything stays as it is. Raises ModuleNotFoundError where transformers is not
    installed.
    """
    if is_patched():
        return Patched(ours=False)
    if why := why_not():
        warnings.warn(f"lcikernels: transformers is left alone: {why}", stacklevel=2)
        return Patched(ours=False)
    watch_imports()
    offer_to_kernels()
    for wrapper in wrappers():
        give(wrapper)
    return Patched(ours=True)


def unpatch() -> None:
    """Put back every object that `patch()` replaced. Without a `patch()` before it does nothing."""
    unfinished.clear()
    while undo:
        undo.pop()()


def is_patched() -> bool:
    """Whether transformers' models compute with this package's kernels now."""
    return bool(undo)


def why_not() -> str | None:
    """Why transformers is not patched, or None."""
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "lcikernels.compat.transformers needs transformers: pip install 'lcikernels[growth]'"
        )
    have, (first, end) = version("transformers"), TESTED
    if not numbers(first) <= numbers(have) < numbers(end):
        return f"it is {have}, tested are {first} and later, before {end}"
    return None if wrapper_code() else f"{DECORATOR} is written otherwise than in {first}"


def scans(model: nn.Module) -> int:
    """How many of a model's layers are Mamba or Mamba-2 of transformers, whose scans `patch()` computes."""
    if why_not():
        return 0
    served = {wrapper.__module__ for wrapper in wrappers() if named(wrapper) in SCANS}
    return sum(hasattr(x, "A_log") and type(x).__module__ in served for x in model.modules())


def numbers(version: str) -> tuple[int, ...]:
    """(5, 24) of "5.24.1.dev0"."""
    return tuple(int(x) for x in re.findall(r"\d+", version)[:2])


def wrapper_code() -> CodeType | None:
    """The code that every wrapper runs, or None where its parts are not the known ones."""
    from transformers.integrations import hub_kernels

    code = inspect.unwrap(getattr(hub_kernels, DECORATOR)).__code__
    for name in ("decorator", "wrapped"):
        inner = [x for x in code.co_consts if isinstance(x, CodeType) and x.co_name == name]
        if len(inner) != 1:
            return None
        (code,) = inner
    known = {"applicable_params", "func_name", "implementation", "is_new_implementation", "torch_function"}
    return code if known <= set(code.co_freevars) else None


def wrappers() -> Iterator[FunctionType]:
    """Those in the modules that are imported."""
    code, seen = wrapper_code(), set()
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for value in list(names.values()) if DECORATOR in names else ():
            function = unwrapped(value)
            if function is not None and function.__code__ is code and id(function) not in seen:
                seen.add(id(function))
                yield function


def unwrapped(value: object) -> FunctionType | None:
    """A function itself, or the one that the `kernels` library has made a module of."""
    if issubclass(type(value), nn.Module) and hasattr(type(value), "kernel_layer_name"):
        value = parts(type(value).forward).get("func")
        value = value.cell_contents if value is not None else None
    return value if isinstance(value, FunctionType) else None


def parts(function: FunctionType) -> dict[str, CellType]:
    """The cells of what a function takes from around it, by name."""
    return dict(zip(function.__code__.co_freevars, function.__closure__ or ()))


def named(wrapper: FunctionType) -> str:
    """The name that it looks a kernel up by."""
    return parts(wrapper)["func_name"].cell_contents


def give(wrapper: FunctionType) -> None:
    """Make a wrapper call ours, where there is one, or make the model call several of ours."""
    cells, name = parts(wrapper), named(wrapper)
    ours = cells["torch_function"].cell_contents if name in SPLIT else SERVED.get(name)
    if ours is None:
        return
    new = {
        "implementation": ours,
        "applicable_params": tuple(inspect.signature(ours).parameters),
        "is_new_implementation": True,
    }
    for cell, value in new.items():
        replace(cells[cell], "cell_contents", value)
    if name == "mamba_chunk_scan_combined":
        names = cells["torch_function"].cell_contents.__globals__
        if not give_norms(names):
            unfinished.append(names)


def replace(owner: object, name: str, value: object) -> None:
    """Set an attribute until `unpatch()`."""
    undo.append(partial(setattr, owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def give_norms(names: dict[str, object]) -> bool:
    """Make the gated norms of a module with Mamba-2 compute by ours: in torch one takes as long as a scan.

    Returns whether there is one.
    """
    norms = [
        value
        for name, value in names.items()
        if name.endswith("RMSNormGated") and set(inspect.signature(value).parameters) <= NORM_SIZES
    ]
    for norm in norms:
        replace(norm, "forward", gated_norm(norm.forward))
    return bool(norms)


def gated_norm(forward: Callable) -> Callable:
    """`forward` of a norm of groups of channels, with a gate before it, or after where it says so."""

    @wraps(forward)
    def run(self, hidden_states, gate=None):
        if is_exporting():
            return forward(self, hidden_states, gate)
        groups = getattr(self, "n_groups", None)
        size = self.group_size if groups is None else hidden_states.shape[-1] // groups
        return mamba_ssm.rmsnorm_fn(
            hidden_states,
            self.weight,
            None,
            z=gate,
            eps=self.variance_epsilon,
            group_size=size,
            norm_before_gate=getattr(self, "norm_before_gate", False),
        )

    return run


def watch_imports() -> None:
    """Make the wrappers of modules that are imported from now on call ours, too."""
    from transformers import integrations
    from transformers.integrations import hub_kernels

    original = getattr(integrations, DECORATOR)  # asked for here, a lazy module keeps it

    @wraps(original)
    def watching(*args, **kwargs):
        decorate = original(*args, **kwargs)

        def decorator(torch_function):
            value = decorate(torch_function)
            if is_patched():
                give(unwrapped(value))
            return value

        return decorator

    def restore() -> None:  # in modules that have imported it meanwhile, too
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(DECORATOR) is watching:
                setattr(module, DECORATOR, original)

    undo.append(restore)
    integrations.__dict__[DECORATOR] = hub_kernels.__dict__[DECORATOR] = watching


class Wrapper(NamedTuple):
    """A "repository" of the `kernels` library, with one layer: the wrapper itself, that calls ours."""

    name: str

    def load(self) -> type[nn.Module]:
        class Layer(nn.Module):
            can_torch_compile = has_backward = True

            def forward(self, *args, **kwargs):
                return type(self).forward(self, *args, **kwargs)

        like = next(x for x in wrappers() if named(x) == self.name)
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        Layer.forward.__signature__ = inspect.Signature(
            [itself, *inspect.signature(like).parameters.values()]
        )
        return Layer


def offer_to_kernels() -> None:
    """Where the `kernels` library is installed, keep a model with use_kernels=True from the Hub's kernels."""
    from transformers.integrations import hub_kernels

    if not hub_kernels.is_kernels_available():
        return
    mapping = hub_kernels.get_kernel_mapping_transformers()
    before = {name: mapping.get(name) for name in SERVED}
    for name, devices in before.items():
        mapping[name] = {**(devices or {}), "cpu": Wrapper(name), "cuda": Wrapper(name)}

    def restore() -> None:
        mapping.update(before)
        for name in [name for name, devices in before.items() if devices is None]:
            del mapping[name]

    undo.append(restore)


def models() -> dict[str, list[str]]:
    """The names that transformers looks kernels up by, and the models whose modules do."""
    found: dict[str, list[str]] = {}
    folder = Path(find_spec("transformers").origin).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        for name in re.findall(rf'@{DECORATOR}\(\s*"(\w+)"', file.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(file.parent.name)
    return found


def main() -> None:
    """Print what `patch()` does here."""
    try:
        why = why_not()
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    print(f"transformers {version('transformers')}: {f'left alone: {why}' if why else 'patch() reaches'}")
    found = models()
    for name, ours in SERVED.items():
        tell(f"{name}: {inspect.unwrap(ours).__module__}.{name}", found.get(name, ["no model"]))
    tell("the gated norms: lcikernels.compat.mamba_ssm.norms.rmsnorm_fn", found["mamba_chunk_scan_combined"])
    for name in sorted(set(found) - set(SERVED)):
        tell(f"{name}: left to transformers: {LEFT.get(name, 'nothing here computes it')}", found[name])


def tell(what: str, where: list[str]) -> None:
    print(f"\n{what}\n    in {', '.join(where)}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends it, as it does any command
    main()
