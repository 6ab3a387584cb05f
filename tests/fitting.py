"""Calls that a verb most likely takes: sizes that divide, options that exist, data in the model's words."""

from dataclasses import fields
from random import Random

import torch

from growth.methods import Method
from growth.plan import Source
from growth.sizes import sizes_of
from growth.training.data import Windows

CHOICES = {
    "symmetry": ("projection", "comp"),
    "noise": (0.0, 0.1, 1.0),
    "initialisation": ("aki", "fpi"),
    "snr": (None, 10.0),
    "place": ("append", "alternate"),
    "skip_first": (0, 1),
    "copy_noise": (0.0, 0.1),
    "zero_outputs": (True, True, False),
}
ADDED = {"staged": ("identity", "copy"), "fine": ("idle", "nearest", "linear")}
SHORT = {"batch_size": 2, "steps": 1, "batches": 1}
SIZED = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size")
WHOLE = ("staged", "hypercloning", "mango", "gstack")  # that take whole factors alone
TRAINED = {
    "gradient_accumulation": (1, 2),
    "schedule": ("cosine", "constant", "lemon"),
    "warmup": (0, 1),
    "weight_decay": (0.0, 0.5),
    "learning_rate": (1e-4, 1e-2),
    "bf16": (False, True),
    "gradient_checkpointing": (False, True),
    "scaled_rates": (False, True),
    "keep_optimizer": (False, True),
    "warm_new": (0, 2),
    "rates": (None, {"*bias": 0.5}),
    "seed": (0, 1),
}


def words(V: int, length: int = 12) -> Windows:
    """Eight windows of tokens below V."""
    ids = torch.randint(3, V, (8 * length,), generator=torch.Generator().manual_seed(0))
    return Windows(ids, length)


def some(random: Random, of: dict[str, tuple], share: float = 0.5) -> dict:
    """Of some of the names a value each."""
    return {name: random.choice(values) for name, values in of.items() if random.random() < share}


def growing(random: Random, source: Source, method: type[Method]) -> tuple[dict, dict]:
    """The method's options, and sizes."""
    known = {x.name for x in fields(method)}
    options = some(random, {x: CHOICES[x] for x in CHOICES if x in known})
    if method.name in ADDED:
        options["added"] = random.choice(ADDED[method.name])
    if method.sparse:
        return {"experts": 2 * (sizes_of(source.model).experts or 1)}, {}
    if "data" in known and (method.name != "fine" or random.random() < 0.5):
        options |= {"data": words(source.config.vocab_size)} | {x: SHORT[x] for x in SHORT if x in known}
    return options, larger(random, source, method)


def larger(random: Random, source: Source, method: type[Method]) -> dict[str, int]:
    """Whole factors of all sizes, or some added to some of them."""
    have, sizes = sizes_of(source.model), {}
    if method.grows == {"ffn-size"}:
        return {"ffn_size": have.ffn + random.randint(1, 40)}
    whole = method.name in WHOLE or random.random() < 0.6
    if random.random() < 0.6:
        sizes["num_layers"] = 2 * have.layers if whole else have.layers + random.randint(1, 2)
    if whole:
        return sizes | ({} if sizes and random.random() < 0.5 else {"hidden_size": 2 * have.hidden})
    head = have.hidden // (have.heads or 4)
    sizes["hidden_size"] = have.hidden + head * random.randint(0, 3)
    in_proportion = have.ffn * sizes["hidden_size"] // have.hidden
    return sizes | {"ffn_size": in_proportion + random.choice((0, random.randint(1, 40)))}


def shrinking(random: Random, source: Source, cache) -> dict:
    """Smaller sizes, and what chooses units."""
    have = sizes_of(source.model)
    half = {"hidden_size": have.hidden, "num_heads": have.heads, "ffn_size": have.ffn}
    half["experts"] = have.experts
    asked = {name: size // 2 for name, size in half.items() if size and random.random() < 0.4}
    if "ffn_size" in asked:
        asked["ffn_size"] = random.randint(1, have.ffn)
    if not asked or random.random() < 0.4:
        asked["num_layers"] = random.randint(1, have.layers - 1)
    if random.random() < 0.3:
        asked |= {"data": words(source.config.vocab_size), "windows": 2, "cache": cache}
        asked["score"] = random.choice(("activation", "redundancy"))
        asked["merge"] = random.random() < 0.5
    return asked


def transferring(random: Random, source: Source) -> dict:
    """Mixers for each layer."""
    asked = some(
        random,
        {
            "copy": ("norms", "mlp", "output", "all"),
            "decays": ("retnet", "alibi", "learned"),
            "keep_attention": ((0,), (1, 2)),
            "mixers": ("retention", "mamba", "mamba2", "attention"),
        },
    )
    if not asked.keys() & {"keep_attention", "mixers"}:
        asked["pattern"] = "".join(random.choices("RMSA", k=source.model.architecture.layers))
    if random.random() < 0.2:
        asked |= {"data": words(source.config.vocab_size), "align": random.randint(0, 1)}
    return asked


def training(random: Random, src) -> dict:
    """Three steps, however they are taken."""
    asked = {"steps": 3, "batch_size": 2, "save_every": 1, "eval_every": random.randint(1, 3)}
    return asked | some(random, TRAINED | {"teacher": (None, src)}, 0.3)
