"""XATL: attention is replaced by a mixer of linear cost, all else is kept.  Choi, 2024 (arXiv 2404.02684).

    copy        copied besides the embeddings, the head and the norms
    "norms"     nothing: mixers and feed-forward blocks start fresh
    "mlp"       the feed-forward blocks
    "output"    + the output projection of each mixer (the default; the paper's best)
    "all"       + queries, keys and values

A layer that stays attention is always copied whole. Mamba has no output projection of the source's shape, so
the source's is dropped there, and the plan says so. A model whose layers all stay attention computes the
source's logits.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import is_torchelastic_launched
from transformers import PreTrainedConfig

from growth.checkpoint import Checkpoint
from growth.engine import made, one_thread
from growth.errors import refuse, refuse_odd_seed
from growth.families.lci import LCI
from growth.folders import refuse_existing, refuse_too_large
from growth.plan import Source
from growth.record import new_record
from growth.report import Report
from growth.transferring.planned import COPIED, Weights, plan_transfer
from growth.transferring.sources import SOURCES, lci_config, left_behind
from growth.writing import write_checkpoint

LETTERS = {"attention": "A", "retention": "R", "mamba": "M"}


def transfer(
    src: str | Path,
    dst: str | Path,
    *,
    mixers: str = "retention",
    pattern: str | None = None,
    keep_attention: Sequence[int] = (),
    copy: str = "output",
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Transfer the checkpoint `src`, a folder or the Hub's, to an LCI model of its size in folder `dst`.

    mixers          retention | mamba | attention, in every layer
    keep_attention  the layers, from 0, that stay attention
    pattern         instead of both: a letter per layer, A attention, R retention, M Mamba
    copy            norms | mlp | output | all (see above)

    Returns a Report; growth.json in `dst` records the plan. Raises Refusal, with nothing written, where the
    source cannot be read, a mixer, layer or letter does not exist, or `dst` does.
    """
    if is_torchelastic_launched():
        raise refuse("transfer", "one process", "torchrun", "start it without; training takes several")
    refuse_odd_seed(seed)
    if mixers not in LETTERS:
        raise refuse("mixers", f"one of {', '.join(LETTERS)}", mixers, "choose one of these")
    if copy not in COPIED:
        raise refuse("copy", f"one of {', '.join(COPIED)}", copy, "choose one of these")
    if not dry_run:
        refuse_existing(dst)
    began = time.perf_counter()
    checkpoint = Checkpoint(src)
    if checkpoint.config.model_type not in SOURCES:
        raise refuse(
            str(src),
            f"a checkpoint to transfer: {', '.join(SOURCES)}",
            checkpoint.config.model_type,
            "no table leads from its norms and embeddings to an LCI model's yet",
        )
    source = Source(checkpoint)
    stored = source.dtype([source.where("embed.weight", None)])
    config = lci_config(
        checkpoint.config, _pattern(checkpoint.config, mixers, pattern, keep_attention), stored
    )
    target, weights = LCI.model(config), Weights(source, config, copy, seed)
    plan = plan_transfer(source, target, weights)
    notes, parameters = left_behind(checkpoint.config), (source.parameters, plan.parameters)
    if not dry_run:
        refuse_too_large(dst, plan.bytes)
        how = {"parameters": parameters, "pattern": config.pattern, "copy": copy, "seed": seed}
        record = new_record("transfer", "xatl", checkpoint, weights.lossless, plan, notes=notes, **how)
        with one_thread():
            write_checkpoint(dst, config, made(plan, source), plan.rows, checkpoint, record)
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        f"xatl {config.pattern}",
        weights.lossless,
        time.perf_counter() - began,
        0,
        parameters,
        plan,
        notes,
    )


def _pattern(
    config: PreTrainedConfig, mixers: str, pattern: str | None, keep_attention: Sequence[int]
) -> str:
    L = config.num_hidden_layers
    if pattern is None:
        beyond = [layer for layer in keep_attention if not 0 <= layer < L]
        if beyond:
            raise refuse("keep-attention", f"layers from 0 to {L - 1}", beyond[0], "count the layers from 0")
        return "".join("A" if layer in keep_attention else LETTERS[mixers] for layer in range(L))
    if keep_attention:
        raise refuse("pattern", "either a pattern or layers that keep attention", "both", "leave one out")
    if len(pattern) != L or set(pattern) - set(LETTERS.values()):
        raise refuse(
            "pattern",
            f"{L} letters out of {', '.join(LETTERS.values())}",
            repr(pattern),
            "give one letter per layer",
        )
    return pattern
