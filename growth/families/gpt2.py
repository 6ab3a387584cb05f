"""GPT-2: learned positions, a tied head, matrices stored [in, out], q, k, v fused side by side."""

from transformers import PreTrainedConfig

from growth.architecture import Architecture
from growth.errors import refuse
from growth.families.frames import Frame, decoder
from growth.families.stored import Stored, block
from growth.families.table import Family, Fields, Parts

TURNED = "i o -> o i"


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    frame = Frame(
        config.n_embd,
        config.n_head,
        config.n_inner or 4 * config.n_embd,
        kind="layer",
        eps="layer_norm_epsilon",
        gated=False,
        biases=(True, True, True),
    )
    return decoder(
        frame,
        vocab=config.vocab_size,
        layers=config.n_layer,
        tied=config.tie_word_embeddings,
        eps=config.layer_norm_epsilon,
        init_std=config.initializer_range,
        positions=config.n_positions,
    )


def accepts(config: PreTrainedConfig) -> None:
    if config.add_cross_attention:
        raise refuse("add_cross_attention", "a model of text alone", True, "the table has no cross attention")


GPT2 = Family(
    "gpt2",
    architecture,
    {
        "embed": Stored("transformer.wte"),
        "positions": Stored("transformer.wpe"),
        "norm": Stored("transformer.ln_f"),
        "head": Stored("lm_head"),
        **block(
            "transformer.h.{}.",
            {
                "mixer_norm": "ln_1",
                ("mixer.q", "mixer.k", "mixer.v"): Stored(
                    "attn.c_attn", "e (part h d) -> part (h d) e", "(part h d) -> part (h d)"
                ),
                "mixer.o": Stored("attn.c_proj", TURNED),
                "mlp_norm": "ln_2",
                "mlp.up": Stored("mlp.c_fc", TURNED),
                "mlp.down": Stored("mlp.c_proj", TURNED),
            },
        ),
    },
    Fields("n_embd", ("n_layer",), "n_head", ffn="n_inner"),
    accepts=accepts,
    tied={"lm_head.weight": "transformer.wte.weight"},
    older={r"^(?=(wte|wpe|h|ln_f)\.)": "transformer."},
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    numbered="scale_attn_by_inverse_layer_idx",
)
