"""lcikernels' own models: a mixer per layer (A attention, R retention, M Mamba) in a block shared by all."""

from transformers import PreTrainedConfig

from growth.adapters.table import Adapter, Entry, one
from growth.errors import refuse

MODEL = {
    "model.embed_tokens.weight": one("embed.weight", layout="v d -> d v"),
    "model.norm.weight": one("norm.weight"),
    "model.norm.bias": one("norm.bias"),
    "lm_head.weight": one("head.weight"),
}
BLOCK = {
    f"model.layers.{{}}.{disk}.{kind}": one(f"layers.{{}}.{name}.{kind}")
    for disk, name in {
        "mixer_norm": "mixer_norm",
        "mlp_norm": "mlp_norm",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }.items()
    for kind in ("weight", "bias")
}
PROJECTIONS = {"A": "qkvo", "R": "qkvgo"}
MAMBA = (
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "A_log",
    "D",
    "out_proj.weight",
)


def model(config: PreTrainedConfig) -> dict[str, Entry]:
    return MODEL


def block(config: PreTrainedConfig, layer: int) -> dict[str, Entry]:
    return BLOCK | mixer(config.pattern[layer], bool(config.attention_bias))


def mixer(letter: str, bias: bool) -> dict[str, Entry]:
    """The tensors of one mixer. Mamba's have no counterpart elsewhere and keep their published names."""
    if letter == "S":
        raise refuse("pattern", "mixers A, R and M", "S, Mamba-2", "its tensors have no table yet")
    if letter == "M":
        return {f"model.layers.{{}}.mixer.{name}": one(f"layers.{{}}.mamba.{name}") for name in MAMBA}
    return {
        f"model.layers.{{}}.mixer.{part}_proj.{kind}": one(f"layers.{{}}.mixer.{part}.{kind}")
        for part in PROJECTIONS[letter]
        for kind in ("weight", "bias")[: 1 + bias]
    }


LCI = Adapter("lci", model, block, head={"lm_head.weight": "model.embed_tokens.weight"})
