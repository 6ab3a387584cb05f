"""The verb `shrink`: a checkpoint in, a smaller checkpoint out, the way back of `grow`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growth.checkpoint import Checkpoint, chosen_dtype
from growth.companions import refuse_broken_companions, refuse_other_companions
from growth.costs.told import costs_of
from growth.engine import made, one_thread
from growth.errors import refuse, refuse_odd_seed
from growth.folders import refuse_odd_output, refuse_too_large
from growth.methods.option import refuse_other
from growth.methods.ordered import layer_numbers
from growth.plan import Source, in_dtype
from growth.record import named, refuse_closed
from growth.report import Report
from growth.shrinking.bonds import Bonds
from growth.shrinking.calibration import WINDOWS, Calibration, calibrated, windows_for
from growth.shrinking.keeping import Scores, order_of
from growth.shrinking.magnitude import Magnitude
from growth.shrinking.merging import Merged
from growth.shrinking.scores import Activation, Redundancy
from growth.shrinking.smaller import Noted, Smaller, chosen_layers
from growth.sizes import Sizes, changed, chosen_sizes, followed, resized
from growth.training.data import Data
from growth.writing import SHARD_BYTES, refuse_odd_shards, write_checkpoint

SCORES = ("magnitude", "activation", "redundancy")


def shrink(
    src: str | Path,
    dst: str | Path | None = None,
    sizes: Sizes | None = None,
    *,
    score: str = "magnitude",
    data: Data | None = None,
    merge: bool | None = None,
    layers: Sequence[int] | str | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    ffn_size: int | None = None,
    experts: int | None = None,
    windows: int = WINDOWS,
    sequence_length: int | None = None,
    text_field: str = "text",
    cache: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Shrink the checkpoint `src`, a folder or a Hub id, into a smaller one in the new folder `dst`.

    sizes       what the target is to have, or in short form hidden_size, num_layers, num_heads, num_kv_heads,
                ffn_size and experts: see growth.Sizes. Fewer heads are whole groups where there are fewer kv
                heads, else as many of each group; where kv heads alone are fewer, each is the mean of some
    layers      keep exactly these, such as [0, 2] or "0,2"; default: those of the highest scores, in their
                order, of a hybrid one of each kind at least
    score       magnitude | activation | redundancy, see growth.shrinking.magnitude and .scores; the latter
                two take data
    data        text: files or a folder, or Windows; for a model of images Images
    merge       fold what is removed into what stays (growth.shrinking.merging); default: where there are data
    windows     how many of `sequence_length` tokens (512, or the model's positions) calibration runs on, and
                growth.shrinking.calibration what it keeps; a second call on the same source and windows finds
                it in `cache`, a folder, by default growth's in the Hub's cache. One layer of the model is in
                memory at a time, but for classes that keep several tensors of the file in one
    dtype       of the target's tensors; default: as the source's
    shard_bytes the largest file
    dry_run     plan only; `dst` may be left out then. What takes data runs on them all the same

    Returns a Report; growth.json in `dst` records the plan, what stays and its scores. No equality is
    promised: `growth.train(..., teacher=src)` recovers what was lost. Raises Refusal, with nothing written,
    where the source cannot be read or its masks never opened, the target is larger or does not divide into
    heads or these into groups, layers are named that are not there, `dst` exists, or data lack, are of no use
    or do not fit the model.
    """
    refuse_odd_seed(seed)
    refuse_other("score", score, SCORES)
    layers = layer_numbers("layers", layers) if isinstance(layers, str) else layers
    dtype = chosen_dtype(dtype)
    refuse_odd_shards(shard_bytes)
    refuse_odd_output(dst, dry_run)
    began = time.perf_counter()
    source = Source(Checkpoint(src))
    refuse_closed(source.checkpoint)
    refuse_broken_companions(source.checkpoint.path)
    wanted = chosen_sizes(sizes, Sizes(hidden_size, num_layers, num_heads, num_kv_heads, ffn_size, experts))
    refuse_unfit(source, wanted, layers)  # before a run of the model
    refuse_unused(score, data, wanted)
    by_unit = source.family.by_unit(source.config)
    bonds = Bonds(source.model.architecture, {wire for wire, _ in by_unit.values()})
    merges = _merges(merge, data) and narrower(wanted)
    found = None
    if score != "magnitude" or merges:
        examples = windows_for(source, data, windows, sequence_length, f"score {score}", seed, text_field)
        moments = merges or (score == "redundancy" and narrower(wanted))
        found = calibrated(source, bonds, examples, moments, cache)
    scores = Noted(scores_of(score, source, bonds, found))
    smaller = Smaller.of(source, wanted, layers, bonds, scores)
    folded = Merged(source, bonds, smaller.kept, found if merges else None)
    target = smaller.target
    plan = in_dtype(smaller.plan(folded, seed), target, dtype)
    target.config.architectures = [target.written_as]
    target.config.dtype = plan.rows[0].dtype
    if not dry_run:
        refuse_too_large(dst, plan.bytes)
        settings = {"score": score, "merge": merges, **smaller.told(scores)}
        asked = {"data_name": named(data), "merge": merge, "windows": windows, "text_field": text_field}
        asked |= {"data": found and found.told["data"]}  # where it has no name
        asked |= {"sequence_length": sequence_length, "layers": layers and [*layers], "dtype": dtype}
        settings |= {"asked": asked}
        settings |= {"calibration": _told(found)} if found else {}
        record = smaller.record(plan, score, seed, settings)
        with one_thread():
            rows = made(plan, folded)
            write_checkpoint(
                dst, target.config, rows, plan.rows, source.checkpoint, record, shard_bytes=shard_bytes
            )
    seconds, costs = time.perf_counter() - began, None
    if dry_run:
        by_data = "running the model on data" if found else ""
        costs = costs_of(source, target, plan, dst, seconds, shard_bytes, uncounted=by_data)
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        score,
        False,
        seconds,
        0,
        (source.parameters, plan.parameters),
        plan,
        tuple(smaller.lost(merges)),
        changed(source.model, target),
        {"calibration": _told(found) | {"cached": found.cached}} if found else {},
        followed(source.model, target, wanted),
        costs=costs,
    )


def _merges(merge: bool | None, data: Data | None) -> bool:
    if merge and data is None:
        raise refuse("merge", "data to merge by", "none", "pass a file or a folder of text, or leave it out")
    return data is not None if merge is None else merge


def refuse_unused(score: str, data: Data | None, wanted: Sizes) -> None:
    """Raises Refusal where data are given that neither scores nor merging would look at."""
    if data is not None and score == "magnitude" and not narrower(wanted):
        remedy = "add --score activation or redundancy, or leave it out"
        raise refuse("data", "none where whole layers and experts go by magnitude", named(data), remedy)


def narrower(wanted: Sizes) -> bool:
    """Does any wire get narrower whose readers others could be folded into?"""
    return wanted != Sizes(layers=wanted.layers, experts=wanted.experts)


def scores_of(score: str, source: Source, bonds: Bonds, found: Calibration | None) -> Scores:
    """The scores of that name."""
    magnitude = Magnitude(source, bonds)
    if score == "magnitude":
        return magnitude
    return {"activation": Activation, "redundancy": Redundancy}[score](bonds, found, magnitude)


def refuse_unfit(source: Source, wanted: Sizes, layers: Sequence[int] | None) -> None:
    """Raises Refusal where the target cannot be, whatever stays."""
    chosen, wanted = chosen_layers(source.model, wanted, layers, None)
    config = resized(source.model, wanted, order_of(chosen), "shrink")
    if wanted.layers is None or layers is not None:  # else those that are chosen decide what kinds there are
        smaller = source.family.model(config, source.model.parts)
        old, new = source.model.architecture, smaller.architecture
        refuse_other_companions(source.checkpoint.path, old, new)


def _told(found: Calibration) -> dict[str, Any]:
    return {name: found.told[name] for name in ("data", "windows", "tokens")}
