"""The heads and decays of the retention that takes attention's place, as fields of LCIConfig."""

import math
from collections.abc import Sequence, Sized
from typing import Any

from transformers import PreTrainedConfig

from growth.errors import refuse
from growth.transferring.sources import pattern_of, retention_heads, said

NAMED = ("retnet", "alibi", "learned")


def alibi_log_decays(H: int) -> list[float]:
    """-2^(-8 (h + 1) / H) for h = 0 .. H-1: the slopes of ALiBi's biases.  Press et al. 2022, section 3."""
    return [-(2.0 ** (-8 * (h + 1) / H)) for h in range(H)]


def retention_fields(
    config: PreTrainedConfig,
    pattern: str,
    decays: str | Sequence[float] = "retnet",
    heads: int | None = None,
) -> dict[str, Any]:
    """What LCIConfig is told of retention besides what the source says.

    decays: retnet | alibi | learned, or for each head the share that it keeps, above 0 and at most 1. heads:
    None for the source's; of other heads each has its own keys and values.
    Raises Refusal where they do not fit, and where there is no retention, or only the source's own.
    """
    asked = {"decays": decays if decays != "retnet" else None, "retention-heads": heads}
    for flag, got in asked.items():
        if got is not None and "R" not in pattern:
            raise refuse(flag, "retention in the pattern (R)", f"none in {pattern}", "leave it out")
        if got is not None and "R" in pattern_of(config):
            remedy = "leave it out: all retention layers of a model have the same"
            raise refuse(flag, "none, for the source has layers of retention", got, remedy)
    fields: dict[str, Any] = {}
    own = retention_heads(said(config))
    H, width = own["retention_num_heads"], own["retention_num_heads"] * own["retention_head_dim"]
    if heads not in (None, H):
        if type(heads) is not int or heads < 1 or width % heads:
            fit = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
            raise refuse(
                "retention-heads", f"a divisor of the {width} dims of attention", heads, f"choose {fit}"
            )
        rope = said(config).get("rope_parameters") or {}
        if any(x.get("rope_type") == "longrope" for x in (rope, *rope.values()) if isinstance(x, dict)):
            expected, remedy = (
                f"{H}, for longrope has a factor for each pair of dims of a head",
                "leave it out",
            )
            raise refuse("retention-heads", expected, heads, remedy)
        fields |= {"retention_num_heads": heads, "retention_head_dim": width // heads}
        fields |= {"retention_num_kv_heads": heads}
        H = heads
    if decays == "learned":
        fields["retention_learned_decay"] = True
    elif decays == "alibi":
        fields["retention_log_decay"] = alibi_log_decays(H)
    elif decays != "retnet":
        fields["retention_log_decay"] = _logs(decays, H)
    return fields


def _logs(decays: str | Sequence[float], H: int) -> list[float]:
    expected, remedy = f"{', '.join(NAMED)}, or a number for each of {H} heads", "such as 0.9,0.95"
    if isinstance(decays, str) or not isinstance(decays, Sized):
        raise refuse("decays", expected, decays, remedy)
    if len(decays) != H:
        raise refuse("decays", expected, f"{len(decays)} numbers", remedy)
    for x in decays:
        if not isinstance(x, int | float) or not 0 < x <= 1:
            raise refuse("decays", "above 0, and at most 1: the share that a head keeps", x, remedy)
    return [math.log(x) for x in decays]
