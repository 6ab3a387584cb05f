"""The only loop over parameters: new[i] = write . (sum_j depth[i, j] old[j]) . read^T"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from growth.adapters.table import Adapter, Entry
from growth.maps import Maps
from growth.plan import Plan, Row, Source
from growth.spaces import Architecture, Weight

Read = Callable[[str, int | None], Tensor]


def reader(source: Source) -> Read:
    """(weight, layer) -> the weight, in its own axis order; float32 at least, for W / 3 has no 16 bits."""
    heads = source.config.num_attention_heads

    @lru_cache(maxsize=1)  # the parts of a fused projection follow each other
    def parts(name: str, entry) -> tuple[Tensor, ...]:
        x = source.checkpoint.read(name)
        return entry.from_disk(x.to(torch.promote_types(x.dtype, torch.float32)), heads)

    def read(weight: str, layer: int | None) -> Tensor:
        name, entry, part = source.place[weight, layer]
        return parts(source.on_disk[name], entry)[part]

    return read


def expand(weight: Weight, layer: int | None, old: Read, maps: Maps) -> Tensor:
    """One wide weight of one target layer, without noise."""
    if layer is None:
        x = old(weight.name, None)
    else:
        row = maps.depth[weight.name][layer].tolist()
        x = sum(w * old(weight.name, j) for j, w in enumerate(row) if w)
        if not torch.is_tensor(x):
            x = torch.zeros_like(old(weight.name, 0))
        if weight.name in maps.constants:
            x = x + float(maps.constants[weight.name][layer])
    x = _map(maps, weight, layer, 0).write(x)
    return _map(maps, weight, layer, 1).read(x) if x.ndim == 2 else x


def _map(maps: Maps, weight: Weight, layer: int | None, axis: int):
    return maps.spaces[weight.spaces[axis].format(layer)]


def noise(
    weight: Weight, layer: int | None, like: Tensor, maps: Maps, std: float, seed: int
) -> Tensor | float:
    """What parts the copies: a fresh matrix, less all that can be seen of it; 0 where nothing was copied."""
    if like.ndim < 2 or not (reading := _map(maps, weight, layer, 1)).noise:
        return 0.0
    generator = torch.Generator().manual_seed(named_seed(seed, weight.name.format(layer)))
    fresh = torch.randn(like.shape, dtype=like.dtype, generator=generator)
    return reading.unseen(fresh * (std * reading.noise))


def grown(
    source: Source, adapter: Adapter, config: PreTrainedConfig, maps: Maps, old: Architecture, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the grown model in its layout on disk, not rounded yet."""
    read = reader(source)
    for name, (entry, layer) in adapter.table(config).items():
        parts = []
        for weight in entry.weights:
            x = expand(weight, layer, read, maps)
            parts.append(x + noise(weight, layer, x, maps, old.init_std, seed))
        yield name, entry.to_disk(parts, config.num_attention_heads)


def plan_growth(
    source: Source, adapter: Adapter, config: PreTrainedConfig, maps: Maps, new: Architecture
) -> Plan:
    """Where every grown tensor comes from."""
    rows = []
    for name, (entry, layer) in adapter.table(config).items():
        used = [(weight, j) for weight in entry.weights for j in _layers(maps, weight, layer)]
        sources = tuple(dict.fromkeys(source.where(weight.name, j) for weight, j in used))
        same = all(
            _map(maps, weight, layer, axis).same
            for weight in entry.weights
            for axis in range(len(weight.spaces))
        ) and all(layer is None or maps.depth[x.name][layer].sum() == 1 for x in entry.weights)
        rows.append(
            Row(
                name,
                entry.disk_shape(new.spaces, config.num_attention_heads),
                source.dtype(sources or _of_all_layers(source, entry)),
                "copied" if same and len(sources) == 1 else "expanded",
                sources,
                "" if sources else f"{_constant(maps, entry, layer)}: added layers change nothing at first",
            )
        )
    used_names = {source for row in rows for source in row.sources}
    of_the_model = set(source.on_disk.values())
    return Plan(
        tuple(rows),
        {
            name: "no layer of the target takes it" if name in of_the_model else "the model does not use it"
            for name in source.checkpoint.names
            if name not in used_names
        },
    )


def _layers(maps: Maps, weight: Weight, layer: int | None) -> list[int | None]:
    return [None] if layer is None else maps.depth[weight.name][layer].nonzero().flatten().tolist()


def _of_all_layers(source: Source, entry: Entry) -> list[str]:
    return [source.where(entry.weights[0].name, j) for j in range(source.config.num_hidden_layers)]


def _constant(maps: Maps, entry: Entry, layer: int) -> str:
    constants = maps.constants.get(entry.weights[0].name)
    return "one" if constants is not None and constants[layer] else "zero"


def named_seed(seed: int, name: str) -> int:
    """A seed per tensor, so that one tensor's values depend on nothing but its name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
