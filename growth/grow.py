"""The verb `grow`: a checkpoint and a method in, a larger checkpoint out."""

import copy
import math
import time
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from growth import __version__
from growth.adapters import source_adapter
from growth.engine import grown, plan_growth
from growth.errors import refuse
from growth.files import Checkpoint, refuse_existing, write_checkpoint
from growth.learning import Expansion, train
from growth.operators import LEARNED, OPERATORS
from growth.operators.ligo import TIES_OF, LearnedMaps, chosen, ligo
from growth.operators.mango import Mango, mango
from growth.plan import Source
from growth.report import Report
from growth.spaces import Architecture
from growth.training.data import Windows

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
    data: str | Path | Windows | None = None,
    steps: int = 100,
    batch_size: int = 16,
    sequence_length: int = 512,
    learning_rate: float | None = None,
    start: str = "lossless",
    ties: str | None = None,
    learn: Collection[str] = ("*",),
    rank: int = 1,
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Grow the checkpoint in folder `src` into a larger one in the new folder `dst`.

    method          stack | interpolate | net2net | lemon | ligo | mango (see growth.operators)
    hidden_size     width of the residual stream; default: the source's, or num_heads x the head size
    num_heads       default: hidden_size / the head size, which never changes
    ffn_size        neurons of a feed-forward block; default: in proportion to hidden_size
    num_layers      default: the source's
    data, steps     for ligo and mango: the text to learn from (a file, a folder, Windows), and how long
    batch_size      for ligo and mango: windows a step
    sequence_length for ligo and mango: tokens a window; the model's positions where these are fewer
    learning_rate   for ligo and mango: the highest; default: 0.5 / the source's width, for a new unit sums
                    over as many old ones
    start           for ligo: "lossless", LEMON's maps, so that step 0 computes what the source does;
                    "net2net", close to it where that is impossible; "published", a noisy stack of averaged
                    units
    ties            for ligo: "published", readers tied to producers, or "untied"; default: by the start
    learn           for ligo: patterns of the maps that learn, such as depth.* (growth.operators.ligo.chosen)
    rank            for mango: terms of its ring

    Returns a Report; growth.json in `dst` records the plan. Raises Refusal, with nothing written, where the
    source cannot be read, the target is smaller or does not divide into heads, the method is unknown or `dst`
    exists.
    """
    if method not in OPERATORS:
        raise refuse("method", f"one of {', '.join(OPERATORS)}", method, "choose one of these")
    if not dry_run:
        refuse_existing(dst)
    began = time.perf_counter()
    checkpoint = Checkpoint(src)
    adapter = source_adapter(checkpoint.config, str(src))
    source = Source(checkpoint, adapter)
    config = resized(checkpoint.config, hidden_size, num_layers, num_heads, ffn_size)
    old, new = (adapter.describe(x, adapter) for x in (checkpoint.config, config))
    options = {"seed": seed}
    if method in LEARNED:
        if learning_rate is None:
            learning_rate = RATE / checkpoint.config.hidden_size
        learning = {"steps": steps, "batch_size": batch_size, "sequence_length": sequence_length}
        learning |= {"learning_rate": learning_rate}
        for name, value in learning.items():
            if not value > 0:
                raise refuse(name.replace("_", "-"), "more than 0", value, "the default is a place to start")
        options |= learning
    if method == "ligo":
        maps = ligo(old, new, start=start, ties=ties, seed=seed)
        options |= {"start": start, "ties": ties or TIES_OF[start], "learn": chosen(maps, learn)}
        if not options["learn"]:
            raise refuse("learn", "maps that learn", "none", "leave it out for all of them")
    elif method == "mango":
        maps = mango(old, new, rank=rank)
        options["rank"] = rank
    else:
        maps = OPERATORS[method](old, new)
    setattr(config, adapter.eps, old.norm_eps * maps.norm_eps)
    flops, tensors = 0, grown(source, adapter, config, maps, old, seed)
    if method in LEARNED and not dry_run:
        if data is None:
            raise refuse("data", f"text that {method} learns from", "none", "pass a file or a folder of text")
        operator = (
            LearnedMaps(maps, source, learn)
            if method == "ligo"
            else Mango(source, old, new, rank=rank, seed=seed)
        )
        expansion = Expansion(operator, source, adapter, config)
        flops, options["training_loss"] = train(expansion, data, name=method, seed=seed, **learning)
        maps, tensors = operator.maps(), expansion.tensors()
    plan = plan_growth(source, adapter, config, maps, new)
    lossless = method not in LEARNED and maps.lossless(old)  # learning leaves the lossless start
    if not dry_run:
        record = {
            "growth": __version__,
            "verb": "grow",
            "method": method,
            "source": str(src),
            "lossless": lossless,
            "from": sizes(old),
            "to": sizes(new),
            **options,
            **plan.json(),
        }
        # Copying counts no operations; dense maps do, and the counter slows small tensors down fivefold.
        with FlopCounterMode(display=False) if method in LEARNED else nullcontext() as counter:
            write_checkpoint(dst, config, tensors, len(plan.rows), checkpoint.path, record)
        flops += counter.get_total_flops() if counter else 0
    parameters = sum(math.prod(checkpoint.shape(name)) for name in source.on_disk.values())
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        f"ligo from its {start} start" if method == "ligo" else method,
        lossless,
        time.perf_counter() - began,
        flops,
        (parameters, sum(math.prod(row.shape) for row in plan.rows)),
        plan,
    )


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
