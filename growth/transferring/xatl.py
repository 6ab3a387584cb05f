"""XATL: attention is replaced by a mixer of linear cost, all else is kept.  Choi, 2024 (arXiv 2404.02684).

    copy        copied besides the embeddings, the head and the norms, those of queries and keys too
    "norms"     nothing: mixers and feed-forward blocks start fresh
    "mlp"       the feed-forward blocks
    "output"    + the output projection of each mixer (the default; the paper's best)
    "all"       + queries, keys and values

A layer that stays what it is, attention above all, is always copied whole: where the source's attention sees
a window alone, so does what is kept of it. Mamba has no tensors of attention's shapes, so these are dropped
there, and the plan says so. A model whose layers all stay computes the source's logits.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch.distributed import is_torchelastic_launched
from transformers import PreTrainedConfig

from growth.checkpoint import Checkpoint
from growth.companions import refuse_broken_companions
from growth.costs.told import costs_of
from growth.engine import made, one_thread
from growth.errors import refuse, refuse_odd_seed
from growth.folders import beside, refuse_odd_output, refuse_too_large
from growth.plan import Source
from growth.record import named, new_record, refuse_closed
from growth.report import Report
from growth.training.data import Data
from growth.transferring.align import Alignment
from growth.transferring.fitted import Fitted, count_of, fitting_of
from growth.transferring.formats import format_of, written
from growth.transferring.planned import COPIED, plan_transfer
from growth.transferring.retaining import retention_fields
from growth.transferring.sources import MIXERS, left_behind, pattern_of, said_by
from growth.transferring.starting import Starting
from growth.writing import write_checkpoint
from lcikernels.models.fields import ATTENTION

LETTERS = {"attention": "A", "retention": "R", "mamba": "M", "mamba2": "S"}


def transfer(
    src: str | Path,
    dst: str | Path | None = None,
    *,
    mixers: str = "retention",
    pattern: str | None = None,
    keep_attention: Sequence[int] | str = (),
    copy: str = "output",
    decays: str | Sequence[float] = "retnet",
    retention_heads: int | None = None,
    start: str | None = None,
    align: int | Alignment | None = None,
    data: Data | None = None,
    text_field: str = "text",
    format: str = "lci",
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Transfer the checkpoint `src`, a folder or the Hub's, to a model of its size in folder `dst`.

    mixers          retention | mamba | mamba2 | attention, in every layer
    keep_attention  the layers, from 0, that stay attention; or "auto:K", the K that data choose: those whose
                    attention in the place of a fitted mixer brings the model closest to the source
    pattern         instead of both: a letter per layer, A attention as the source has it there, W the same
                    where it has a window, R retention, M Mamba, S Mamba-2. What the letter of a source with
                    layers of these kinds keeps is copied
    copy            norms | mlp | output | all (see above)
    decays          the share of its memory that each head of retention keeps from token to token:
                    retnet | alibi | learned, which starts as RetNet's, or a number for each head
    retention_heads of as many dims together as attention's; default: attention's own
    start           how mixers start: published | attention (growth.transferring.mixers). None is the better
                    one: with data retention starts from attention, else `copy` says what it takes of it
    align           steps of fitting each new mixer to the source's attention on data, before all training; an
                    Alignment says how. 0: with data the last projection alone is solved for. None: 100 with
                    data, 0 without: the row "hybrid" of benchmarks/REUSE.md beside "hybrid, solved" and
                    "hybrid, unaligned". "hybrid-early", of a source trained at a constant rate, saves most
                    of those with several seeds
    data            text, or Windows: what mixers are fitted to and layers are chosen by
    text_field      of rows, the field or column that holds the text
    format          what it is written as: lci, our own class, which holds all of these; granitemoehybrid,
                    which transformers, vLLM and SGLang have; fla, flash-linear-attention's RetNet

    Returns a Report; growth.json in `dst` records the plan. Raises Refusal, with nothing written, where the
    source cannot be read or computes what an LCI model does not, a mixer, layer or letter does not exist,
    heads or decays do not fit, the format does not hold a setting of the model, or `dst` exists.
    """
    if is_torchelastic_launched():
        raise refuse("transfer", "one process", "torchrun", "start it without; training takes several")
    refuse_odd_seed(seed)
    if copy not in [*COPIED]:
        raise refuse("copy", f"one of {', '.join(COPIED)}", copy, "choose one of these")
    form = format_of(format)
    refuse_odd_output(dst, dry_run)
    asked = {"mixers": mixers, "pattern": pattern, "keep_attention": keep_attention, "decays": decays}
    asked |= {"retention_heads": retention_heads, "start": start, "text_field": text_field}
    asked |= {"align": align if isinstance(align, int) else None, "data_name": named(data)}
    began, count = time.perf_counter(), count_of(keep_attention)
    checkpoint = Checkpoint(src)
    refuse_closed(checkpoint)
    refuse_broken_companions(checkpoint.path)
    said_by(checkpoint.config, str(src))
    source = Source(checkpoint)
    letters = chosen_pattern(
        checkpoint.config, mixers, pattern, () if pattern is None and count is not None else keep_attention
    )
    fields = retention_fields(checkpoint.config, letters, decays, retention_heads)
    starting = Starting(source, letters, fields, start, copy, seed, data is not None)
    fitting = fitting_of(starting, align, data, count, text_field)
    written(form, (fitting.such(starting) if fitting else starting).config)  # refuses before any work
    learns = partial(fitting.on_paper, starting) if fitting else None
    fitted, notes = Fitted(), left_behind(checkpoint.config) + starting.lost()
    if count and dry_run:
        notes += (f"data choose {count} layers that keep their attention: this plan has the first as such",)
        starting = fitting.such(starting)
    with beside(dst) if fitting and not dry_run else nullcontext(Path(dst or ".")) as folder:
        if fitting and not dry_run:
            weights = starting.weights()
            room = plan_transfer(source, weights.model, weights).bytes
            refuse_too_large(dst, room + fitting.bytes(starting))
            fitted = fitting.run(starting, folder)
            starting = starting.keeping(fitted.kept)
        starts = fitting.starts(starting, folder) if fitting else starting.starts()
        weights, config = starting.weights(starts), starting.config
        target = written(form, config)
        plan, notes = plan_transfer(source, target, weights), (*notes, *form.notes(config))
        parameters = source.parameters, plan.parameters
        if not dry_run:
            refuse_too_large(dst, plan.bytes)
            how = {"parameters": parameters, "pattern": config.pattern, "copy": copy, "seed": seed}
            how |= {"format": format, "start": starting.told(), **fitted.json}
            how |= {"asked": asked}
            record = new_record("transfer", "xatl", checkpoint, weights.lossless, plan, notes=notes, **how)
            with one_thread():
                write_checkpoint(dst, target.config, made(plan, source), plan.rows, checkpoint, record)
    seconds, costs = time.perf_counter() - began, None
    if dry_run:
        by_data = "what mixers learn from data" if fitting else ""
        costs = costs_of(source, target, plan, dst, seconds, uncounted=by_data, learns=learns)
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        f"xatl {config.pattern}",
        weights.lossless,
        seconds,
        fitted.flops,
        parameters,
        plan,
        notes,
        details=fitted.json,
        lines=fitted.lines,
        costs=costs,
    )


def chosen_pattern(
    config: PreTrainedConfig,
    mixers: str,
    pattern: str | None = None,
    keep_attention: Sequence[int] = (),
) -> str:
    """The letters of the target's layers, where attention stays that of the source's own layer.

    Raises Refusal where a mixer, a layer or a letter does not exist, or attention is to be where the source
    has none.
    """
    own = pattern_of(config)
    L, count = len(own), range(len(own))
    if mixers not in [*LETTERS]:
        raise refuse("mixers", f"one of {', '.join(LETTERS)}", mixers, "choose one of these")
    if not isinstance(keep_attention, Iterable):
        got, remedy = repr(keep_attention), "give them in a list"
        raise refuse("keep-attention", "layer numbers such as 1,11", got, remedy)
    if pattern is None:
        if beyond := [layer for layer in keep_attention if layer not in count]:
            raise refuse("keep-attention", f"layers from 0 to {L - 1}", beyond[0], "count the layers from 0")
        wanted = "".join("A" if layer in keep_attention else LETTERS[mixers] for layer in count)
    elif keep_attention:
        raise refuse("pattern", "either a pattern or layers that keep attention", "both", "leave one out")
    elif mixers != "retention":
        raise refuse("pattern", "either a pattern or mixers", "both", "leave one out")
    elif not isinstance(pattern, str) or len(pattern) != L or set(pattern) - set(MIXERS):
        expected = f"{L} letters out of {', '.join(MIXERS)}"
        raise refuse("pattern", expected, repr(pattern), "give one letter per layer")
    else:
        wanted = pattern
    for layer, (letter, has) in enumerate(zip(wanted, own, strict=True)):
        if letter in ATTENTION and has not in (letter, *(ATTENTION if letter == "A" else "")):
            got = f"{letter}, where the source has {MIXERS[has]} ({has})"
            remedy = f"keep its letter, as in {own}, or choose another mixer"
            raise refuse(f"layer {layer}", f"attention as the source has it, or {has}", got, remedy)
    return "".join(has if letter == "A" else letter for letter, has in zip(wanted, own, strict=True))
