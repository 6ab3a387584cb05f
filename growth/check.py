"""Do two models agree? The proof behind "lossless"."""

from dataclasses import dataclass
from pathlib import Path

import torch

from growth.errors import refuse
from growth.files import Checkpoint
from growth.loading import load_model

# Of the largest logit. A grown weight of 16 bits is a rounded one: measured, 0.2 to 0.75 eps of the largest
# logit for 3 to 12 layers, so 2 eps are allowed. Transfer only copies.
LIMIT = {"grow": 1e-4, "transfer": 1e-5}
ROUNDING = {"grow": 2.0, "transfer": 0.0}


@dataclass(frozen=True)
class Agreement:
    """max |logit difference| in float32 and in the stored dtype, the largest logit, and what growth.json
    promised.

    limit: the largest difference in float32 that keeps the promise: 1e-4 for grown models, or 2 eps of the
    stored dtype where that is more, 1e-5 for transferred ones, each times the largest logit where that
    exceeds 1; None where equality was not promised.
    """

    float32: float
    stored: float
    stored_dtype: str
    largest: float
    limit: float | None

    @property
    def kept(self) -> bool:
        """False when a promised equality fails."""
        return self.limit is None or self.float32 <= self.limit

    def __str__(self) -> str:
        measured = (
            f"max |logit difference|: {self.float32:.2e} in float32, {self.stored:.2e} in "
            f"{self.stored_dtype} (largest logit {self.largest:.2f})"
        )
        if self.limit is None:
            return f"{measured}; no equality was promised"
        return f"{measured}; promised at most {self.limit:.1e}: {'kept' if self.kept else 'BROKEN'}"


@torch.no_grad()
def check(src: str | Path, dst: str | Path, *, batch: int = 2, length: int = 128, seed: int = 0) -> Agreement:
    """Compare the logits of two language models on `batch` x `length` random tokens.

    src, dst: checkpoint folders; the promise is the one in dst's growth.json. Raises Refusal where one cannot
    be read or their vocabularies differ.
    """
    old, new = Checkpoint(src), Checkpoint(dst)
    V = old.config.vocab_size
    if new.config.vocab_size != V:
        raise refuse(
            str(dst),
            f"the source's vocabulary of {V}",
            new.config.vocab_size,
            "compare models of one tokenizer",
        )
    T = min(length, *(getattr(model.config, "max_position_embeddings", length) for model in (old, new)))
    ids = torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(seed))
    stored = new.config.dtype or torch.float32
    difference = {}
    for dtype in dict.fromkeys((stored, torch.float32)):
        truth, got = (load_model(path, dtype).eval()(input_ids=ids).logits.double() for path in (src, dst))
        difference[dtype] = (got - truth).abs().max().item()
    largest = truth.abs().max().item()
    record = new.record()
    limit = None
    if record.get("lossless"):
        verb = record["verb"]
        limit = max(1.0, largest) * max(LIMIT[verb], ROUNDING[verb] * torch.finfo(stored).eps)
    return Agreement(
        difference[torch.float32], difference[stored], str(stored).removeprefix("torch."), largest, limit
    )
