"""GPT-NeoX (Pythia): LayerNorm, partial rotary, parallel or sequential residual; q, k, v fused per head."""

from transformers import PreTrainedConfig

from growth.adapters.table import QKV, QKV_BIAS, Adapter, Entry, one
from growth.spaces import Architecture, Space, transformer_spaces

MODEL = {
    "gpt_neox.embed_in.weight": one("embed.weight", "residual", "vocab", layout="v d -> d v"),
    "gpt_neox.final_layer_norm.weight": one("norm.weight", "final_gain"),
    "gpt_neox.final_layer_norm.bias": one("norm.bias", "final"),
    "embed_out.weight": one("head.weight", "vocab", "final"),
}
BLOCK = {
    "gpt_neox.layers.{}.input_layernorm.weight": one("layers.{}.mixer_norm.weight", "gain"),
    "gpt_neox.layers.{}.input_layernorm.bias": one("layers.{}.mixer_norm.bias", "normed"),
    "gpt_neox.layers.{}.attention.query_key_value.weight": Entry(QKV, "(h part d) e -> part (h d) e"),
    "gpt_neox.layers.{}.attention.query_key_value.bias": Entry(QKV_BIAS, "(h part d) -> part (h d)"),
    "gpt_neox.layers.{}.attention.dense.weight": one("layers.{}.mixer.o.weight", "residual", "value.{}"),
    "gpt_neox.layers.{}.attention.dense.bias": one("layers.{}.mixer.o.bias", "residual"),
    "gpt_neox.layers.{}.post_attention_layernorm.weight": one("layers.{}.mlp_norm.weight", "gain"),
    "gpt_neox.layers.{}.post_attention_layernorm.bias": one("layers.{}.mlp_norm.bias", "normed"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight": one("layers.{}.mlp.up.weight", "ffn.{}", "normed"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias": one("layers.{}.mlp.up.bias", "ffn.{}"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight": one("layers.{}.mlp.down.weight", "residual", "ffn.{}"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias": one("layers.{}.mlp.down.bias", "residual"),
}


def model(config: PreTrainedConfig) -> dict[str, Entry]:
    return MODEL


def block(config: PreTrainedConfig, layer: int) -> dict[str, Entry]:
    return {
        name: entry
        for name, entry in BLOCK.items()
        if config.attention_bias or not (".attention." in name and name.endswith(".bias"))
    }


def describe(config: PreTrainedConfig, adapter: Adapter) -> Architecture:
    spaces = transformer_spaces(config.hidden_size, config.num_attention_heads, config.intermediate_size)
    return adapter.architecture(config, spaces | {"vocab": Space(config.vocab_size)})


GPT_NEOX = Adapter(
    "gpt_neox",
    model,
    block,
    describe,
    renamed={"lm_head.weight": "embed_out.weight"},
    head={"embed_out.weight": "gpt_neox.embed_in.weight"},
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
