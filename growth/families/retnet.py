"""flash-linear-attention's RetNet: retention in each layer, RMSNorm, a gated feed-forward block, no biases.

transformers knows the type once `fla` is imported.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from growth.architecture import Architecture, Stack, Table, Wire
from growth.errors import refuse
from growth.families.frames import Frame, assembled
from growth.families.lci import retention
from growth.families.stored import Stored, block
from growth.families.table import Family, Fields, Parts

EPS = "norm_eps"


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    frame = Frame(config.hidden_size, config.num_heads, config.intermediate_size, eps=EPS)
    layer = (
        *frame.block("mixer", retention(frame, learned=False)),
        *frame.block("mlp", frame.feed_forward()),
    )
    ops = (
        Table("embed", "vocab", "residual"),
        frame.norm("norm", "residual", "final", "final_gain"),
        *frame.head(bool(config.tie_word_embeddings)),
    )
    stacks = {"": Stack(("",) * config.num_hidden_layers, {"": layer})}
    eps, deviation = {EPS: config.norm_eps}, config.initializer_range
    return assembled(frame.wires() | wires(config), ops, stacks, eps, deviation)


def wires(config: PreTrainedConfig) -> dict[str, Wire]:
    """Those of retention, and the words."""
    H, Hk = config.num_heads, config.num_kv_heads or config.num_heads
    K, V = (round(config.hidden_size * share) // H for share in (config.expand_k, config.expand_v))
    heads = {"query": Wire(H, K), "key": Wire(Hk, K), "value": Wire(Hk, V)}
    heads |= dict.fromkeys(("mixed", "out"), Wire(H, V))
    own = {f"retention.{name}.{{}}": wire for name, wire in heads.items()}
    return own | {"vocab": Wire(config.vocab_size, fixed=True)}


def accepts(config: PreTrainedConfig) -> None:
    for name, fits, expected in (
        ("attn", not config.attn, "none"),
        ("attnres_block_size", config.attnres_block_size is None, "none"),
        ("elementwise_affine", not config.elementwise_affine, "false"),
        ("feature_map", config.feature_map is None, "none"),
        ("hidden_act", config.hidden_act == "swish", "swish"),
        ("intermediate_size", config.intermediate_size is not None, "a number"),
        ("use_output_gate", config.use_output_gate, "true"),
    ):
        if not fits:
            raise refuse(name, expected, getattr(config, name), "other RetNets have no table")


def resized(old: PreTrainedConfig, new: PreTrainedConfig) -> Mapping[str, Any]:
    if new.hidden_size != old.hidden_size:
        remedy = "grow layers or the feed-forward block, for a head's decay follows from its number"
        raise refuse("hidden-size", f"the source's {old.hidden_size}", new.hidden_size, remedy)
    return {}


RETNET = Family(
    "retnet",
    architecture,
    {
        "embed": Stored("model.embeddings"),
        "norm": Stored("model.norm"),
        "head": Stored("lm_head"),
        **block(
            "model.layers.{}.",
            {
                "mixer_norm": "attn_norm",
                **{f"mixer.{part}": f"attn.{part}_proj" for part in "qkvgo"},
                "mlp_norm": "mlp_norm",
                **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
            },
        ),
    },
    Fields(heads="num_heads", kv_heads="num_kv_heads"),
    accepts=accepts,
    resized=resized,
    tied={"lm_head.weight": "model.embeddings.weight"},
)
