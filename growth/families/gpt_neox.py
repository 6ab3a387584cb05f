"""GPT-NeoX (Pythia): LayerNorm, partial rotary, parallel or sequential residual; q, k, v fused per head."""

from transformers import PreTrainedConfig

from growth.architecture import Architecture
from growth.families.frames import Frame, decoder
from growth.families.stored import Stored, block
from growth.families.table import Family, Parts


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    frame = Frame(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        kind="layer",
        eps="layer_norm_eps",
        gated=False,
        biases=(config.attention_bias, config.attention_bias, True),
    )
    return decoder(
        frame,
        vocab=config.vocab_size,
        layers=config.num_hidden_layers,
        tied=config.tie_word_embeddings,
        eps=config.layer_norm_eps,
        init_std=config.initializer_range,
    )


GPT_NEOX = Family(
    "gpt_neox",
    architecture,
    {
        "embed": Stored("gpt_neox.embed_in"),
        "norm": Stored("gpt_neox.final_layer_norm"),
        "head": Stored("embed_out"),
        **block(
            "gpt_neox.layers.{}.",
            {
                "mixer_norm": "input_layernorm",
                ("mixer.q", "mixer.k", "mixer.v"): Stored(
                    "attention.query_key_value",
                    "(h part d) e -> part (h d) e",
                    "(h part d) -> part (h d)",
                ),
                "mixer.o": "attention.dense",
                "mlp_norm": "post_attention_layernorm",
                "mlp.up": "mlp.dense_h_to_4h",
                "mlp.down": "mlp.dense_4h_to_h",
            },
        ),
    },
    tied={"embed_out.weight": "gpt_neox.embed_in.weight"},
    memory={r"^lm_head\.weight$": "embed_out.weight"},
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
