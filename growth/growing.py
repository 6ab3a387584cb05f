"""The verb `grow`: a checkpoint and a method in, a larger checkpoint out."""

import copy
import math
import time
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from growth.adapters import source_adapter
from growth.checkpoint import LARGEST, Checkpoint
from growth.engine import grown, plan_growth
from growth.errors import refuse, refuse_odd_seed
from growth.folders import refuse_existing, refuse_too_large
from growth.learning import Expansion, fit, windows_for
from growth.maps import Maps
from growth.operators import LEARNED, OPERATORS
from growth.operators.ligo import TIES_OF, LearnedMaps, chosen, ligo, planned
from growth.operators.mango import Mango, mango
from growth.plan import Source
from growth.record import new_record
from growth.report import Report
from growth.spaces import Architecture
from growth.training.data import Data, Windows
from growth.writing import write_checkpoint

LEARNING = {"data": None, "steps": 100, "batch_size": 16, "sequence_length": None, "learning_rate": None}
OPTIONS = {  # of methods that learn, and what they are unless given
    "ligo": LEARNING | {"start": "lossless", "ties": None, "learn": ("*",)},
    "mango": LEARNING | {"rank": 1},
}
RATE = 0.5  # of learned maps, over the source's width: at 96 it learns more than 0.2 does, and no less than 1


def grow(
    src: str | Path,
    dst: str | Path,
    *,
    method: str,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    ffn_size: int | None = None,
    data: Data | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    learning_rate: float | None = None,
    start: str | None = None,
    ties: str | None = None,
    learn: Collection[str] | None = None,
    rank: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Grow the checkpoint `src`, a folder or the Hub's, into a larger one in the new folder `dst`.

    method          stack | interpolate | net2net | lemon | ligo | mango (see growth.operators)
    hidden_size     width of the residual stream; default: the source's, or num_heads x the head size
    num_heads       default: hidden_size / the head size, which never changes
    ffn_size        neurons of a feed-forward block; default: in proportion to hidden_size
    num_layers      default: the source's
    data            for ligo and mango: the text to learn from, files, folders or Windows
    steps           for ligo and mango: how long they learn; default: 100
    batch_size      for ligo and mango: windows a step; default: 16
    sequence_length for ligo and mango: tokens a window; default: 512, or the model's positions if fewer
    learning_rate   for ligo and mango: the highest; default: 0.5 / the source's width, for a new unit sums
                    over as many old ones
    start           for ligo: "lossless" (default), LEMON's maps, so that step 0 computes what the source
                    does; "net2net", close to it where that is impossible; "published", a noisy stack of
                    averaged units
    ties            for ligo: "published", readers tied to producers, or "untied"; default: by the start
    learn           for ligo: patterns of the maps that learn, such as depth.* (growth.operators.ligo.chosen);
                    default: all of them
    rank            for mango: terms of its ring; default: 1

    Returns a Report; growth.json in `dst` records the plan. Raises Refusal, with nothing written, where the
    source cannot be read, the target is smaller or does not divide into heads, the method is unknown or has
    no such option, `dst` exists, the data do not fit the model or fill no batch, or learning diverges.
    """
    if method not in OPERATORS:
        raise refuse("method", f"one of {', '.join(OPERATORS)}", method, "choose one of these")
    if is_torchelastic_launched():
        raise refuse("growth", "one process", "torchrun", "start it without; training takes several")
    refuse_odd_seed(seed)
    if not dry_run:
        refuse_existing(dst)
    began = time.perf_counter()
    checkpoint = Checkpoint(src)
    adapter = source_adapter(checkpoint.config, str(src))
    source = Source(checkpoint, adapter)
    config = resized(checkpoint.config, hidden_size, num_layers, num_heads, ffn_size)
    old, new = (adapter.describe(x, adapter) for x in (checkpoint.config, config))
    if not dry_run:
        itemsize = max(checkpoint.dtype(name).itemsize for name in source.on_disk.values())
        refuse_too_large(dst, new.parameters * itemsize)  # before the maps, which memory may not hold either
    given = {"data": data, "steps": steps, "batch_size": batch_size, "sequence_length": sequence_length}
    given |= {"learning_rate": learning_rate, "start": start, "ties": ties, "learn": learn, "rank": rank}
    options = _options(method, checkpoint.config.hidden_size, given)
    maps, made_of = _maps(method, old, new, options, seed)
    plan = plan_growth(source, adapter, config, made_of, new)
    setattr(config, adapter.eps, old.norm_eps * maps.norm_eps)
    config.architectures = [adapter.written_as(config)]
    config.dtype = source.dtype([source.where("embed.weight", None)])
    lossless = method not in LEARNED and maps.lossless(old)  # learning leaves the lossless start
    flops, parameters = 0, (source.parameters, plan.parameters)
    if not dry_run:
        if method in LEARNED:
            windows = _windows(method, source, options)
            operator = (
                LearnedMaps(maps, source, options["learn"])
                if method == "ligo"
                else Mango(source, old, new, rank=options["rank"], seed=seed)
            )
            expansion = Expansion(operator, source, adapter, config)
            how = {name: options[name] for name in ("steps", "batch_size", "learning_rate")}
            flops, options["training_loss"] = fit(expansion, windows, name=method, seed=seed, **how)
            tensors = expansion.tensors()
        else:
            tensors = grown(source, adapter, config, maps, old, seed)
        made = ((row, (x,)) for row, (_, x) in zip(plan.rows, tensors, strict=True))
        how = {"parameters": parameters, "from": sizes(old), "to": sizes(new), "seed": seed, **options}
        record = new_record("grow", method, checkpoint, lossless, plan, **how)
        # Copying counts no operations; dense maps do, and the counter slows small tensors down fivefold.
        with FlopCounterMode(display=False) if method in LEARNED else nullcontext() as counter:
            write_checkpoint(dst, config, made, plan.rows, checkpoint, record)
        flops += counter.get_total_flops() if counter else 0
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        f"ligo from its {options['start']} start" if method == "ligo" else method,
        lossless,
        time.perf_counter() - began,
        flops,
        parameters,
        plan,
    )


def _options(method: str, hidden_size: int, given: dict[str, Any]) -> dict[str, Any]:
    """What a method goes by: what was given, and the defaults of what was not."""
    takes = OPTIONS.get(method, {})
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in takes:
            takers = " or ".join(other for other, options in OPTIONS.items() if name in options)
            got = "some" if name == "data" else value
            remedy = f"leave it out, or choose method {takers}"
            raise refuse(name.replace("_", "-"), f"none, for {method} has no use for it", got, remedy)
    if not takes:
        return {}
    options = takes | given
    if options["learning_rate"] is None:
        options["learning_rate"] = RATE / hidden_size
    if not 0 < options["learning_rate"] < math.inf:
        raise refuse("learning-rate", "more than 0, and finite", options["learning_rate"], "leave it out")
    for name, least in (("steps", 1), ("batch_size", 1), ("sequence_length", 2)):
        if options[name] is not None and options[name] < least:
            raise refuse(name.replace("_", "-"), f"at least {least}", options[name], "choose a larger number")
    return options


def _maps(
    method: str, old: Architecture, new: Architecture, options: dict[str, Any], seed: int
) -> tuple[Maps, Maps]:
    """An operator's maps, and what is made of what; adds to LiGO's options what they leave open."""
    if method == "ligo":
        maps = ligo(old, new, start=options["start"], ties=options["ties"], seed=seed)
        options["ties"] = options["ties"] or TIES_OF[options["start"]]
        options["learn"] = chosen(maps, options["learn"])
        if not options["learn"]:
            raise refuse("learn", "maps that learn", "none", "leave it out for all of them")
        return maps, planned(maps, options["learn"])
    maps = mango(old, new, rank=options["rank"]) if method == "mango" else OPERATORS[method](old, new)
    return maps, maps


def _windows(method: str, source: Source, options: dict[str, Any]) -> Windows:
    """What is learned from; the options tell it as it is from here on."""
    if options["data"] is None:
        raise refuse("data", f"text that {method} learns from", "none", "pass a file or a folder of text")
    windows = windows_for(source, options["data"], options["batch_size"], options["sequence_length"])
    options |= {"data": windows.fingerprint(), "sequence_length": windows.windows.shape[1]}
    return windows


def resized(
    config: PreTrainedConfig,
    hidden_size: int | None,
    num_layers: int | None,
    num_heads: int | None,
    ffn_size: int | None,
) -> PreTrainedConfig:
    """The target's configuration. The head size stays, for rotary frequencies and the softmax scale."""
    adapter = source_adapter(config, "source")
    have = sizes(adapter.describe(config, adapter))
    D, L = have["hidden_size"], have["num_layers"]
    head = D // have["num_heads"]
    if hidden_size is None:
        hidden_size = num_heads * head if num_heads else D
    for name, got, least in (
        ("hidden-size", hidden_size, D),
        ("num-layers", num_layers, L),
        ("num-heads", num_heads, have["num_heads"]),
        ("ffn-size", ffn_size, have["ffn_size"]),
    ):
        if got is not None and got < least:
            raise refuse(name, f"at least the source's {least}", got, "growth never shrinks a model")
        if got is not None and got > LARGEST:
            raise refuse(name, f"at most {LARGEST:,}", got, "no machine holds such a model")
    if hidden_size % head:
        raise refuse(
            "hidden-size",
            f"a multiple of the head size {head}",
            hidden_size,
            f"choose {hidden_size // head * head} or {(hidden_size // head + 1) * head}",
        )
    if num_heads not in (None, hidden_size // head):
        raise refuse(
            "num-heads",
            f"{hidden_size // head}, which is hidden-size {hidden_size} / head size {head}",
            num_heads,
            "leave it out, or choose hidden-size to fit",
        )
    if adapter.numbered and getattr(config, adapter.numbered) and num_layers not in (None, L):
        raise refuse(
            "num-layers",
            f"the source's {L}, for a layer's number enters its attention ({adapter.numbered})",
            num_layers,
            "grow the width alone",
        )
    target = copy.deepcopy(config)
    target.hidden_size, target.num_attention_heads = hidden_size, hidden_size // head
    target.num_hidden_layers = num_layers or L
    ffn_size = ffn_size or have["ffn_size"] * hidden_size // D
    if sizes(adapter.describe(target, adapter))["ffn_size"] != ffn_size:  # GPT-2's may follow from the width
        setattr(target, adapter.ffn, ffn_size)
    if sizes(adapter.describe(target, adapter)) == have:
        raise refuse(
            "target",
            "something larger than the source",
            "the same sizes",
            "pass --hidden-size, --num-layers or --ffn-size",
        )
    return target


def sizes(model: Architecture) -> dict[str, int]:
    return {
        "hidden_size": model.spaces["residual"].size,
        "num_layers": model.layers,
        "num_heads": model.spaces["query.{}"].units,
        "ffn_size": model.spaces["ffn.{}"].size,
    }
