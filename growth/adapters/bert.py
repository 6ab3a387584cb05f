"""BERT with its masked language model's head: post-norm, so that what a norm gives is the stream itself.

The first norm is the embeddings'. The head has a layer of its own, whose neurons are the space `transform`,
and a tied decoder with a bias.
"""

from transformers import AutoModelForMaskedLM, PreTrainedConfig

from growth.adapters.table import Adapter, Entry, one
from growth.errors import refuse
from growth.spaces import Architecture, Space, transformer_spaces

EMBEDDINGS, HEAD = "bert.embeddings.", "cls.predictions."
MODEL = {
    f"{EMBEDDINGS}word_embeddings.weight": one("embed.weight", "residual", "vocab", layout="v d -> d v"),
    f"{EMBEDDINGS}position_embeddings.weight": one(
        "positions.weight", "residual", "positions", layout="p d -> d p"
    ),
    f"{EMBEDDINGS}token_type_embeddings.weight": one(
        "types.weight", "residual", "types", layout="t d -> d t"
    ),
    f"{EMBEDDINGS}LayerNorm.weight": one("embed_norm.weight", "gain"),
    f"{EMBEDDINGS}LayerNorm.bias": one("embed_norm.bias", "normed"),
    f"{HEAD}transform.dense.weight": one("transform.weight", "transform", "normed"),
    f"{HEAD}transform.dense.bias": one("transform.bias", "transform"),
    f"{HEAD}transform.LayerNorm.weight": one("norm.weight", "final_gain"),
    f"{HEAD}transform.LayerNorm.bias": one("norm.bias", "final"),
    f"{HEAD}bias": one("head.bias", "vocab"),
    f"{HEAD}decoder.weight": one("head.weight", "vocab", "final"),
    f"{HEAD}decoder.bias": one("head.own_bias", "vocab"),  # beside it head.bias adds nothing, and is stored
}
LINEAR = {
    "attention.self.query": ("mixer.q", "query.{}", "normed"),
    "attention.self.key": ("mixer.k", "key.{}", "normed"),
    "attention.self.value": ("mixer.v", "value.{}", "normed"),
    "attention.output.dense": ("mixer.o", "residual", "value.{}"),
    "intermediate.dense": ("mlp.up", "ffn.{}", "normed"),
    "output.dense": ("mlp.down", "residual", "ffn.{}"),
}
NORMS = {"attention.output.LayerNorm": "mixer_norm", "output.LayerNorm": "mlp_norm"}
BLOCK = {
    f"bert.encoder.layer.{{}}.{disk}.{kind}": one(f"layers.{{}}.{name}.{kind}", *spaces[:axes])
    for disk, (name, *spaces) in LINEAR.items()
    for kind, axes in (("weight", 2), ("bias", 1))
} | {
    f"bert.encoder.layer.{{}}.{disk}.{kind}": one(f"layers.{{}}.{name}.{kind}", space)
    for disk, name in NORMS.items()
    for kind, space in (("weight", "gain"), ("bias", "normed"))
}


def model(config: PreTrainedConfig) -> dict[str, Entry]:
    if config.is_decoder or config.add_cross_attention:
        got = "a decoder or cross attention"
        raise refuse("config.json", "a masked language model", got, "these BERTs have no table")
    return MODEL


def block(config: PreTrainedConfig, layer: int) -> dict[str, Entry]:
    return BLOCK


def describe(config: PreTrainedConfig, adapter: Adapter) -> Architecture:
    D = config.hidden_size
    spaces = transformer_spaces(D, config.num_attention_heads, config.intermediate_size)
    spaces |= {"transform": Space(D), "vocab": Space(config.vocab_size)}
    spaces |= {"positions": Space(config.max_position_embeddings), "types": Space(config.type_vocab_size)}
    return adapter.architecture(config, spaces, post_norm=True)


BERT = Adapter(
    "bert",
    model,
    block,
    describe,
    older={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    head={
        f"{HEAD}decoder.weight": f"{EMBEDDINGS}word_embeddings.weight",
        f"{HEAD}decoder.bias": f"{HEAD}bias",
    },
    # What BERT's pretraining had for pairs of sentences, and a masked language model does without; buffers.
    ignored=(r"(bert\.pooler|cls\.seq_relationship)\..*", r"bert\.embeddings\.(position|token_type)_ids"),
    auto=AutoModelForMaskedLM,
)
