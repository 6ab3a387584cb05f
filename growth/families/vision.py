"""ViT and DeiT: a class token and patches of an image, positions that are learned, norms before each block.

A patch is a convolution that never overlaps, so a matrix that reads pixels. DeiT has a second token, of which
a teacher's classifier reads what the first one's own reads. Without a classifier the model gives what its
last norm writes, and a pooled class token where there is a pooler.
"""

from math import prod

from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig

from growth.architecture import Architecture, Linear, Op, Output, Pointwise, Stack, Table, Vector, Wire
from growth.families.frames import Frame, assembled
from growth.families.stored import Stored, block
from growth.families.table import Family, Parts

LAYER = {
    "mixer_norm": "layernorm_before",
    "mixer.q": "attention.attention.query",
    "mixer.k": "attention.attention.key",
    "mixer.v": "attention.attention.value",
    "mixer.o": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
IN_MEMORY = {
    r"\.layers\.(?=\d)": ".encoder.layer.",
    r"\.q_proj\.": ".attention.query.",
    r"\.k_proj\.": ".attention.key.",
    r"\.v_proj\.": ".attention.value.",
    r"\.o_proj\.": ".output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
HEADS = {"classes": ("classifier",), "teacher": ("cls_classifier", "distillation_classifier")}


def vision(model_type: str, tokens: tuple[str, ...]) -> Family:
    """A family of this kind. tokens: those that stand before the patches."""

    def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
        D, P = config.hidden_size, config.pooler_output_size
        frame = Frame(
            D,
            config.num_attention_heads,
            config.intermediate_size,
            kind="layer",
            eps="layer_norm_eps",
            gated=False,
            biases=(config.qkv_bias, True, True),
        )
        patch, image = (_sides(x) for x in (config.patch_size, config.image_size))
        patches = prod(a // b for a, b in zip(image, patch, strict=True))
        fixed = {
            "pixels": config.num_channels * prod(patch),
            "positions": patches + len(tokens),
            "classes": config.num_labels,
        }
        wires = frame.wires() | {name: Wire(size, fixed=True) for name, size in fixed.items()}
        wires["pooled"] = Wire(P, fixed=P != D)
        ops = (
            Linear("patches", "pixels", "residual", bias=True),
            *(Vector(token, "residual") for token in tokens),
            Table("positions", "positions", "residual"),
            frame.norm("norm", "residual", "final", "final_gain"),
            *_head(parts),
        )
        stacks = {"": Stack(("",) * config.num_hidden_layers, {"": frame.layer()})}
        eps = {"layer_norm_eps": config.layer_norm_eps}
        return assembled(wires, ops, stacks, eps, config.initializer_range)

    prefix = f"{model_type}."
    return Family(
        model_type,
        architecture,
        {
            "patches": Stored(
                f"{prefix}embeddings.patch_embeddings.projection",
                "d c h w -> d (c h w)",
                lengths=(("c", "num_channels"), ("h", "patch_size")),
            ),
            **{f"{x}.weight": Stored(f"{prefix}embeddings.{x}_token", "1 1 d -> d") for x in tokens},
            "positions.weight": Stored(f"{prefix}embeddings.position_embeddings", "1 p d -> p d"),
            **block(f"{prefix}encoder.layer.{{}}.", LAYER),
            "norm": Stored(f"{prefix}layernorm"),
            "pooler": Stored(f"{prefix}pooler.dense"),
            **{name: Stored(name) for names in HEADS.values() for name in names},
        },
        parts={
            "pooler": (f"{prefix}pooler.dense.weight",),
            **{part: (f"{names[0]}.weight",) for part, names in HEADS.items()},
        },
        auto=auto,
        probe="images",
        resized=resized,
        memory=IN_MEMORY,
        older={r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)": prefix},
        bare=prefix,
    )


def _head(parts: Parts) -> tuple[Op, ...]:
    """What reads the last norm."""
    names = [name for part in HEADS if part in parts for name in HEADS[part]]
    if names:
        return tuple(Linear(name, "final", "classes", bias=True) for name in names)
    pooled = (Linear("pooler", "final", "pooled", bias=True), Pointwise(("pooled",)), Output("pooled"))
    return (Output("final"), *(pooled if "pooler" in parts else ()))


def _sides(size: int | list[int] | tuple[int, int]) -> tuple[int, ...]:
    """Height and width, which a configuration may give as one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def auto(parts: Parts) -> type:
    return AutoModelForImageClassification if parts & HEADS.keys() else AutoModel


def resized(old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, int]:
    """What is pooled goes with the width, unless it has a size of its own."""
    own = old.pooler_output_size != old.hidden_size
    return {"pooler_output_size": old.pooler_output_size if own else new.hidden_size}


VIT = vision("vit", ("cls",))
DEIT = vision("deit", ("cls", "distillation"))
