"""A model of any family of which one layer at a time has weights."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from growth.loading import load_model, quiet
from growth.plan import Source


class Done(Exception):
    """The rest of a forward is of no use."""


class Streamed:
    """The source's model on a device, made by transformers, in its own dtype but in float32 at least.

    What lies outside the layers is there all the time; a layer's weights are read when it is called and gone
    when it has run. The model is whole in memory where its class holds tensors that the file has not, such as
    several experts in one.
    modules: those that hold a weight, by the names that the family's table has for their weights.
    layers: the modules of each stack's layers, by the prefix of its names.
    """

    def __init__(self, source: Source, device: torch.device):
        self.source, self.device = source, device
        kinds = (source.checkpoint.dtype(name) for name in source.on_disk.values())
        self.dtype = torch.promote_types(next(kinds), torch.float32)
        self.model = self._empty()
        self.names = {name: source.model.named(name) for name, _ in self.model.named_parameters()}
        self.streams = all(self._on_disk(name) for name in self.names)
        if not self.streams:
            self.model = load_model(source.checkpoint.path, self.dtype).to(device).eval()
        self.aliases = self._aliases()
        self.modules = self._modules()
        self.layers, held = self._layers()
        if self.streams:
            inside = {name for names in held.values() for name in names}
            for name in self.names:
                if name not in inside:
                    self._fill(name)
            for module, names in held.items():
                module.register_forward_pre_hook(partial(self._load, names))
                module.register_forward_hook(partial(self._forget, names))
            self._buffers()

    def _empty(self) -> PreTrainedModel:
        seen = self.source.model
        poolerless = seen.auto is AutoModel and "pooler" in seen.family.parts.keys() - seen.parts
        with quiet(), init_empty_weights(include_buffers=False):
            more = {"add_pooling_layer": False} if poolerless else {}
            model = seen.auto.from_config(self.source.config, dtype=self.dtype, **more)
        model.tie_weights()  # which making it empty undoes
        self._untie(model)
        return model.eval().requires_grad_(False)

    def _untie(self, model: PreTrainedModel) -> None:
        """What has a tensor of its own in the file is none of another's: T5 1.1's head."""
        first: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            own = self.source.model.named(name)
            if own in self.source.on_disk and first.setdefault(parameter, own) != own:
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, nn.Parameter(parameter.clone()))

    def _aliases(self) -> dict[str, list[str]]:
        """Of each parameter, the other names of the same one."""
        first: dict[nn.Parameter, str] = {}
        found: dict[str, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            found.setdefault(first.setdefault(parameter, name), []).append(name)
        return {name: names[1:] for name, names in found.items()}

    def _on_disk(self, name: str) -> bool:
        """Is the parameter a tensor of the file, as it lies there?"""
        found = self.source.on_disk.get(self.names[name] or "")
        return found is not None and (
            math.prod(self.source.checkpoint.shape(found)) == self.model.get_parameter(name).numel()
        )

    def _modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name, _ in self.model.named_parameters():
            found[self.source.model.named(name) or name] = self.model.get_submodule(name.rpartition(".")[0])
        return found

    def _layers(self) -> tuple[dict[str, list[nn.Module]], dict[nn.Module, list[str]]]:
        """Of each stack the modules of its layers, and of each of these the names of its parameters."""
        architecture, table = self.source.model.architecture, self.source.table
        names: dict[tuple[str, int], list[str]] = defaultdict(list)
        for name, _ in self.model.named_parameters():
            entry, layer = table.get(self.source.model.named(name) or "", (None, None))
            if layer is not None:
                names[architecture.stack_of(entry.weights[0].name)[0], layer].append(name)
        layers: dict[str, list[nn.Module]] = {}
        held: dict[nn.Module, list[str]] = {}
        for (prefix, _), own in sorted(names.items()):
            path = os.path.commonprefix([name.split(".") for name in own])
            while isinstance(module := self.model.get_submodule(".".join(path)), nn.ModuleList):
                path.pop()  # a list of a layer's parts is never called
            layers.setdefault(prefix, []).append(module)
            held[module] = own
        return layers, held

    def _fill(self, name: str) -> None:
        x = self.source.checkpoint.read(self.source.on_disk[self.names[name]])
        x = x.view(self.model.get_parameter(name).shape)
        set_module_tensor_to_device(self.model, name, self.device, value=x, dtype=self.dtype)
        for alias in self.aliases[name]:
            module, _, own = alias.rpartition(".")
            setattr(self.model.get_submodule(module), own, self.model.get_parameter(name))

    def _buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def _load(self, names: list[str], module: nn.Module, given: Any) -> None:
        for name in names:
            self._fill(name)

    def _forget(self, names: list[str], module: nn.Module, given: Any, output: Any) -> None:
        for name in names:
            set_module_tensor_to_device(self.model, name, "meta")

    @contextmanager
    def watched(self, modules: Mapping[nn.Module, Any], layers: Mapping[nn.Module, Any]) -> Iterator[None]:
        """Inside, a module's work is called with what the module is given, and a layer's with its first
        input and its first output."""
        hooks = [
            module.register_forward_pre_hook(partial(_tell, work), with_kwargs=True)
            for module, work in modules.items()
        ]
        hooks += [
            module.register_forward_hook(partial(_compare, work), with_kwargs=True)
            for module, work in layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> None:
        """One forward, up to where a work raises Done."""
        given = {
            name: x.to(self.device, self.dtype) if x.is_floating_point() else x.to(self.device)
            for name, x in inputs.items()
        }
        with quiet(), suppress(Done):
            self.model(**given)


def _first(given: tuple, named: Mapping[str, Any]) -> Tensor:
    return given[0] if given else next(x for x in named.values() if isinstance(x, Tensor))


def _tell(work: Any, module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
    tensors = [x for x in (*given, *named.values()) if isinstance(x, Tensor)]
    work(_first(given, named), alone=len(tensors) == 1)


def _compare(work: Any, module: nn.Module, given: tuple, named: dict[str, Any], output: Any) -> None:
    work(_first(given, named), output[0] if isinstance(output, tuple) else output)
