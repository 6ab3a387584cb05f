"""BERT and RoBERTa: norms after the sum, so that what a norm gives is the stream itself.

The first norm is the embeddings'. A masked language model's head has a layer of its own, whose neurons are
the wire `transform`, and a decoder with a bias. Without a head the stream is what the model gives (sentence
encoders), and a pooled first token where there is a pooler; a classifier reads one or the other.
"""

from collections.abc import Callable, Mapping

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from growth.architecture import Architecture, Linear, Norm, Op, Output, Pointwise, Stack, Table, Vector, Wire
from growth.errors import refuse
from growth.families.frames import Frame, assembled
from growth.families.stored import Stored, block
from growth.families.table import Family, Parts, all_positions

LAYER = {
    "mixer.q": "attention.self.query",
    "mixer.k": "attention.self.key",
    "mixer.v": "attention.self.value",
    "mixer.o": "attention.output.dense",
    "mixer_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    D = config.hidden_size
    frame = Frame(
        D,
        config.num_attention_heads,
        config.intermediate_size,
        kind="layer",
        eps="layer_norm_eps",
        norms="after",
        gated=False,
        biases=(True, True, True),
    )
    fixed = {
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "types": config.type_vocab_size,
        "classes": config.num_labels,
    }
    wires = frame.wires() | {"transform": Wire(D), "pooled": Wire(D)}
    wires |= {name: Wire(size, fixed=True) for name, size in fixed.items()}
    ops = (
        Table("embed", "vocab", "residual"),
        Table("positions", "positions", "residual"),
        Table("types", "types", "residual"),
        frame.norm("embed_norm", "residual", "residual", "gain"),
        *_head(frame, bool(config.tie_word_embeddings), parts),
    )
    stacks = {"": Stack(("",) * config.num_hidden_layers, {"": frame.layer()})}
    eps = {"layer_norm_eps": config.layer_norm_eps}
    return assembled(wires, ops, stacks, eps, config.initializer_range)


def _head(frame: Frame, tied: bool, parts: Parts) -> tuple[Op, ...]:
    """What reads the stream at the end."""
    if "lm" in parts:
        # Beside the head's own bias that of the decoder adds nothing, and is stored where it is not tied.
        own = () if tied else (Vector("own_bias", "vocab"),)
        return (
            Linear("transform", "residual", "transform", bias=True),
            Pointwise(("transform",)),
            Norm("norm", "transform", "final", "final_gain", "layer", frame.eps, bias=True),
            *frame.head(tied, bias=True),
            *own,
        )
    for part in ("tokens", "qa"):
        if part in parts:
            return (Linear(part, "residual", "classes", bias=True),)
    dense = "pooler" if "pooler" in parts else "dense"
    pooled = (Linear(dense, "residual", "pooled", bias=True), Pointwise(("pooled",)))
    if "classes" in parts:
        return (*pooled, Linear("classes", "pooled", "classes", bias=True))
    return (Output("residual"), *((*pooled, Output("pooled")) if "pooler" in parts else ()))


def auto(parts: Parts) -> type:
    if "lm" in parts:
        return AutoModelForMaskedLM
    if "qa" in parts:
        return AutoModelForQuestionAnswering
    if "tokens" in parts:
        return AutoModelForTokenClassification
    return AutoModelForSequenceClassification if "classes" in parts else AutoModel


def accepts(config: PreTrainedConfig) -> None:
    if config.is_decoder or config.add_cross_attention:
        got = "a decoder or cross attention"
        raise refuse("config.json", "a masked language model", got, "these BERTs have no table")
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise refuse("position_embedding_type", "absolute", kind, "relative positions have no table")


def behind_pad(config: PreTrainedConfig) -> int:
    """RoBERTa's first position is the one behind the number of its pad token."""
    return config.max_position_embeddings - config.pad_token_id - 1


def encoder(
    model_type: str,
    prefix: str,
    head: Mapping[str, Stored],
    parts: Mapping[str, tuple[str, ...]],
    positions: Callable[[PreTrainedConfig], int | None],
    poolerless: tuple[str, ...],
) -> Family:
    """A family of this frame. head: what reads the stream; parts: how it is known; poolerless: the parts and
    classes that read no pooler."""
    decoder, bias = head["own_bias.weight"].name.removesuffix(".bias"), head["head.bias"].name
    pooler, poolers = f"{prefix}pooler.dense", rf"{prefix}pooler\..*"
    outside = {
        "embed": "word_embeddings",
        "positions": "position_embeddings",
        "types": "token_type_embeddings",
        "embed_norm": "LayerNorm",
    }
    return Family(
        model_type,
        architecture,
        {
            **{name: Stored(f"{prefix}embeddings.{disk}") for name, disk in outside.items()},
            **block(f"{prefix}encoder.layer.{{}}.", LAYER),
            "pooler": Stored(pooler),
            "tokens": Stored("classifier"),
            "qa": Stored("qa_outputs"),
            **head,
        },
        parts=parts | {"pooler": (f"{pooler}.weight",), "qa": ("qa_outputs.weight",)},
        auto=auto,
        positions=positions,
        probe="masked",
        accepts=accepts,
        tied={
            f"{decoder}.weight": f"{prefix}embeddings.word_embeddings.weight",
            f"{decoder}.bias": bias,
        },
        older={
            r"LayerNorm\.gamma$": "LayerNorm.weight",
            r"LayerNorm\.beta$": "LayerNorm.bias",
            r"^(?=(embeddings|encoder|pooler)\.)": prefix,
        },
        ignored=(rf"{prefix}embeddings\.(position|token_type)_ids",),
        # What pretraining had for pairs of sentences; many files of models that do without hold it still.
        surplus={"lm": (poolers, r"cls\.seq_relationship\..*")}
        | dict.fromkeys((*poolerless, "qa"), (poolers,)),
        bare=prefix,
    )


PREDICTIONS = "cls.predictions."
BERT = encoder(
    "bert",
    "bert.",
    {
        "transform": Stored(f"{PREDICTIONS}transform.dense"),
        "norm": Stored(f"{PREDICTIONS}transform.LayerNorm"),
        "head.weight": Stored(f"{PREDICTIONS}decoder.weight"),
        "head.bias": Stored(f"{PREDICTIONS}bias"),
        "own_bias.weight": Stored(f"{PREDICTIONS}decoder.bias"),
        "classes": Stored("classifier"),
    },
    {
        "lm": (f"{PREDICTIONS}transform.dense.weight",),
        "classes": ("classifier.weight", "bert.pooler.dense.weight"),
        "tokens": ("classifier.weight", "!bert.pooler.dense.weight"),
    },
    all_positions,
    ("BertForTokenClassification",),
)
ROBERTA, XLM_ROBERTA = (
    encoder(
        model_type,
        "roberta.",
        {
            "transform": Stored("lm_head.dense"),
            "norm": Stored("lm_head.layer_norm"),
            "head.weight": Stored("lm_head.decoder.weight"),
            "head.bias": Stored("lm_head.bias"),
            "own_bias.weight": Stored("lm_head.decoder.bias"),
            "dense": Stored("classifier.dense"),
            "classes": Stored("classifier.out_proj"),
        },
        {
            "lm": ("lm_head.dense.weight",),
            "classes": ("classifier.out_proj.weight",),
            "tokens": ("classifier.weight",),
        },
        behind_pad,
        ("classes", "tokens"),
    )
    for model_type in ("roberta", "xlm-roberta")
)
ENCODERS = (BERT, ROBERTA, XLM_ROBERTA)
