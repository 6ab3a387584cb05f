"""GPT-2: learned positions, a tied head, matrices stored [in, out], q, k, v fused side by side."""

from transformers import PreTrainedConfig

from growth.adapters.table import QKV, QKV_BIAS, Adapter, Entry, one
from growth.errors import refuse
from growth.spaces import Architecture, Space, transformer_spaces

MODEL = {
    "transformer.wte.weight": one("embed.weight", "residual", "vocab", layout="v d -> d v"),
    "transformer.wpe.weight": one("positions.weight", "residual", "positions", layout="p d -> d p"),
    "transformer.ln_f.weight": one("norm.weight", "final_gain"),
    "transformer.ln_f.bias": one("norm.bias", "final"),
    "lm_head.weight": one("head.weight", "vocab", "final"),
}
BLOCK = {
    "transformer.h.{}.ln_1.weight": one("layers.{}.mixer_norm.weight", "gain"),
    "transformer.h.{}.ln_1.bias": one("layers.{}.mixer_norm.bias", "normed"),
    "transformer.h.{}.attn.c_attn.weight": Entry(QKV, "e (part h d) -> part (h d) e"),
    "transformer.h.{}.attn.c_attn.bias": Entry(QKV_BIAS, "(part h d) -> part (h d)"),
    "transformer.h.{}.attn.c_proj.weight": one(
        "layers.{}.mixer.o.weight", "residual", "value.{}", layout="i o -> o i"
    ),
    "transformer.h.{}.attn.c_proj.bias": one("layers.{}.mixer.o.bias", "residual"),
    "transformer.h.{}.ln_2.weight": one("layers.{}.mlp_norm.weight", "gain"),
    "transformer.h.{}.ln_2.bias": one("layers.{}.mlp_norm.bias", "normed"),
    "transformer.h.{}.mlp.c_fc.weight": one(
        "layers.{}.mlp.up.weight", "ffn.{}", "normed", layout="i o -> o i"
    ),
    "transformer.h.{}.mlp.c_fc.bias": one("layers.{}.mlp.up.bias", "ffn.{}"),
    "transformer.h.{}.mlp.c_proj.weight": one(
        "layers.{}.mlp.down.weight", "residual", "ffn.{}", layout="i o -> o i"
    ),
    "transformer.h.{}.mlp.c_proj.bias": one("layers.{}.mlp.down.bias", "residual"),
}


def model(config: PreTrainedConfig) -> dict[str, Entry]:
    if config.add_cross_attention:
        raise refuse("add_cross_attention", "a model of text alone", True, "the table has no cross attention")
    return MODEL


def block(config: PreTrainedConfig, layer: int) -> dict[str, Entry]:
    return BLOCK


def describe(config: PreTrainedConfig, adapter: Adapter) -> Architecture:
    D = config.n_embd
    spaces = transformer_spaces(D, config.n_head, config.n_inner or 4 * D)
    spaces |= {"vocab": Space(config.vocab_size), "positions": Space(config.n_positions)}
    return adapter.architecture(config, spaces)


GPT2 = Adapter(
    "gpt2",
    model,
    block,
    describe,
    older={r"^(?=(wte|wpe|h|ln_f)\.)": "transformer."},
    head={"lm_head.weight": "transformer.wte.weight"},
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    ffn="n_inner",
    eps="layer_norm_epsilon",
    numbered="scale_attn_by_inverse_layer_idx",
)
