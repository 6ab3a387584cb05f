"""Granite 4's hybrids without experts: attention or Mamba-2 in each layer, in Llama's frame."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from growth.architecture import Architecture, Stack, Table, Wire
from growth.errors import refuse
from growth.families.frames import Frame, assembled
from growth.families.lci import mamba2
from growth.families.stored import Stored, block
from growth.families.table import Family, Fields, Parts

EPS = "rms_norm_eps"
MAMBA = "linear_attention"
# transformers' names of layers -> the older ones, which it reads too, and vLLM and SGLang alone.
OLDER = {MAMBA: "mamba", "full_attention": "attention"}


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    D, bias = config.hidden_size, bool(config.attention_bias)
    frame = Frame(
        D,
        config.num_attention_heads,
        config.shared_intermediate_size,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or D // config.num_attention_heads,
        eps=EPS,
        biases=(bias, bias, False),
    )
    mixers = {kind: mamba2(frame) if kind == MAMBA else frame.attention() for kind in config.layer_types}
    blocks = {
        kind: (*frame.block("mixer", mixer), *frame.block("mlp", frame.feed_forward()))
        for kind, mixer in sorted(mixers.items())
    }
    ops = (
        Table("embed", "vocab", "residual"),
        frame.norm("norm", "residual", "final", "final_gain"),
        *frame.head(bool(config.tie_word_embeddings)),
    )
    stacks = {"": Stack(tuple(config.layer_types), blocks)}
    eps, deviation = {EPS: config.rms_norm_eps}, config.initializer_range
    return assembled(frame.wires() | wires(config), ops, stacks, eps, deviation)


def wires(config: PreTrainedConfig) -> dict[str, Wire]:
    """Those of Mamba-2, and the words."""
    heads, G, N = config.mamba_n_heads, config.mamba_n_groups, config.mamba_d_state
    fixed = {"vocab": config.vocab_size, "taps": config.mamba_d_conv, "bc": 2 * G * N}
    return {
        **{f"{name}.{{}}": Wire(heads, config.mamba_d_head) for name in ("ssm", "ssm_out", "ssm_gain")},
        "step.{}": Wire(heads),
        "groups": Wire(G, N, fixed=True),
        **{name: Wire(size, fixed=True) for name, size in fixed.items()},
    }


def accepts(config: PreTrainedConfig) -> None:
    mamba = MAMBA in config.layer_types
    for name, fits, expected, remedy in (
        ("num_local_experts", not config.num_local_experts, "0", "experts have no table"),
        ("mamba_n_groups", not mamba or config.mamba_n_groups == 1, "1", "groups of heads have no table"),
        ("mamba_conv_bias", not mamba or config.mamba_conv_bias, "true", "a model without has no table"),
        ("mamba_proj_bias", not (mamba and config.mamba_proj_bias), "false", "a model with has no table"),
    ):
        if not fits:
            raise refuse(name, expected, getattr(config, name), remedy)
    if set(config.layer_types) == {MAMBA}:  # transformers' class asks its cache for one
        raise refuse(
            "layer_types",
            "a layer of attention at least",
            "none",
            "keep one, by --layers where it is to shrink",
        )


def resized(old: PreTrainedConfig, new: PreTrainedConfig) -> Mapping[str, Any]:
    """Mamba-2's heads keep their size: there are more."""
    if MAMBA not in old.layer_types or new.hidden_size == old.hidden_size:
        return {}
    heads, rest = divmod(old.mamba_expand * new.hidden_size, old.mamba_d_head)
    if rest:
        expected = f"a multiple of {old.mamba_d_head} / {old.mamba_expand}, for heads of {old.mamba_d_head}"
        remedy = f"choose {new.hidden_size - -(-rest // old.mamba_expand)}"
        raise refuse("hidden-size", expected, new.hidden_size, remedy)
    return {"mamba_n_heads": heads}


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Layers by their older names, rotary positions in their older fields too, and without a limit that
    bounds nothing, whose infinity is not JSON's."""
    named = fields | {"layer_types": [OLDER.get(kind, kind) for kind in fields["layer_types"]]}
    if rope := dict(fields.get("rope_parameters") or {}):
        named["rope_theta"] = rope.pop("rope_theta")
        named["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if fields.get("time_step_limit") == [0.0, {"__float__": "Infinity"}]:
        del named["time_step_limit"]
    return named


GRANITE_HYBRID = Family(
    "granitemoehybrid",
    architecture,
    {
        "embed": Stored("model.embed_tokens"),
        "norm": Stored("model.norm"),
        "head": Stored("lm_head"),
        **block(
            "model.layers.{}.",
            {
                "mixer_norm": "input_layernorm",
                **{f"mixer.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
                ("mamba2.z", "mamba2.v", "mamba2.bc", "mamba2.dt"): "mamba.in_proj",
                ("mamba2.conv1d.v.weight", "mamba2.conv1d.bc.weight"): Stored(
                    "mamba.conv1d.weight", "channel 1 tap -> channel tap"
                ),
                ("mamba2.conv1d.v.bias", "mamba2.conv1d.bc.bias"): "mamba.conv1d.bias",
                **{f"mamba2.{name}": f"mamba.{name}" for name in ("dt_bias", "A_log", "D")},
                "mamba2.norm": "mamba.norm",
                "mamba2.out_proj": "mamba.out_proj",
                "mlp_norm": "post_attention_layernorm",
                ("mlp.gate", "mlp.up"): "shared_mlp.input_linear",
                "mlp.down": "shared_mlp.output_linear",
            },
        ),
    },
    Fields(kv_heads="num_key_value_heads", ffn="shared_intermediate_size"),
    accepts=accepts,
    lists=("layer_types",),
    resized=resized,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    plain=plain,
)
