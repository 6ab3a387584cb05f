"""T5: an encoder and a decoder on one stream, RMSNorm, biases by distance, which first layers hold for all.

A checkpoint has both stacks or the encoder alone. Its head is the embedding, times hidden^-1/2, or one of its
own without that factor (T5 1.1); configurations that say nothing else mean the first.
"""

from transformers import AutoModelForSeq2SeqLM, AutoModelForTextEncoding, PreTrainedConfig

from growth.architecture import Architecture, Op, Output, Stack, Table, Wire
from growth.families.frames import Frame, assembled
from growth.families.stored import Stored, block
from growth.families.table import Family, Fields, Parts

EPS = "layer_norm_epsilon"
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    D = config.d_model
    gated = config.feed_forward_proj.startswith("gated-")
    prefixes = ("encoder.", "decoder.") if "decoder" in parts else ("encoder.",)
    frames = {
        prefix: Frame(
            D, config.num_heads, config.d_ff, head_dim=config.d_kv, eps=EPS, gated=gated, prefix=prefix
        )
        for prefix in prefixes
    }
    wires: dict[str, Wire] = {"memory": Wire(D), "vocab": Wire(config.vocab_size, fixed=True)}
    ops: list[Op] = [Table("embed", "vocab", "residual")]
    stacks = {}
    for prefix, frame in frames.items():
        buckets = Wire(config.relative_attention_num_buckets, fixed=True)
        wires |= frame.wires() | {"buckets": buckets, f"{prefix}bias": Wire(config.num_heads)}
        ops.append(Table(f"{prefix}bias", "buckets", f"{prefix}bias"))
        layers = config.num_layers if prefix == "encoder." else config.num_decoder_layers
        stacks[prefix] = Stack(("",) * layers, {"": layer(frame)})
    ops.append(frames["encoder."].norm("encoder.norm", "residual", "memory", "gain"))
    if "decoder" in parts:
        frame = frames["decoder."]
        tied = config.scale_decoder_outputs or "head" not in parts
        scale = D**-0.5 if config.scale_decoder_outputs else 1.0
        ops += [
            frame.norm("decoder.norm", "residual", "final", "final_gain"),
            *frame.head(tied, scale=scale),
        ]
    else:
        ops.append(Output("memory"))
    return assembled(
        wires, ops, stacks, {EPS: config.layer_norm_epsilon}, config.initializer_factor * D**-0.5
    )


def layer(frame: Frame) -> tuple[Op, ...]:
    """Attention, in the decoder attention to what the encoder gives, and the feed-forward block."""
    crosses = frame.prefix == "decoder."
    return (
        *frame.block("mixer", frame.attention(along=(f"{frame.prefix}bias",))),
        *(frame.block("cross", frame.attention("cross", keys="memory")) if crosses else ()),
        *frame.block("mlp", frame.feed_forward("mlp" if frame.gated else "plain")),
    )


def auto(parts: Parts) -> type:
    return AutoModelForSeq2SeqLM if "decoder" in parts else AutoModelForTextEncoding


def names(stack: str, mlp: str) -> dict:
    """The names of a stack, whose feed-forward block has this number there."""
    qkvo = {f"mixer.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"}
    dense = f"layer.{mlp}.DenseReluDense"
    mlps = {"mlp.gate": "wi_0", "mlp.up": "wi_1", "mlp.down": "wo", "plain.up": "wi", "plain.down": "wo"}
    modules = qkvo | {name: f"{dense}.{disk}" for name, disk in mlps.items()}
    modules |= {"mixer_norm": "layer.0.layer_norm", "mlp_norm": f"layer.{mlp}.layer_norm"}
    if stack == "decoder":
        modules |= {f"cross.{part}": f"layer.1.EncDecAttention.{part}" for part in "qkvo"}
        modules["cross_norm"] = "layer.1.layer_norm"
    return {
        f"{stack}.bias": Stored(f"{stack}.{BIAS}"),
        f"{stack}.norm": Stored(f"{stack}.final_layer_norm"),
        **block(f"{stack}.block.{{}}.", modules, f"{stack}.layers.{{}}."),
    }


T5 = Family(
    "t5",
    architecture,
    {
        "embed": Stored("shared"),
        "head": Stored("lm_head"),
        **names("encoder", "1"),
        **names("decoder", "2"),
    },
    Fields("d_model", ("num_layers", "num_decoder_layers"), "num_heads", head_dim="d_kv", ffn="d_ff"),
    parts={"decoder": ("decoder.final_layer_norm.weight",), "head": ("lm_head.weight",)},
    auto=auto,
    probe="pairs",
    tied={"lm_head.weight": "shared.weight"},
    older={r"^(encoder|decoder)\.embed_tokens\.weight$": "shared.weight"},
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)
