"""lcikernels' own models: a mixer per layer (A attention, R retention, M Mamba, S Mamba-2) in one frame."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from growth.architecture import (
    Architecture,
    Attention,
    Linear,
    Norm,
    Op,
    Pointwise,
    Stack,
    Table,
    Weight,
    Wire,
)
from growth.errors import refuse
from growth.families.frames import Frame, assembled
from growth.families.stored import Stored, block
from growth.families.table import Family, Fields, Parts, all_positions
from growth.maps import round_robin
from lcikernels.layers.retention import log_decays

EPS = "layer_norm_eps"


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    bias = bool(config.attention_bias)
    frame = Frame(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        head_dim=config.head_dim,
        kind="layer",
        eps=EPS,
        gated=False,
        biases=(bias, bias, True),
    )
    mixers = {"A": frame.attention(), "R": retention(frame), "M": mamba(frame), "S": mamba2(frame)}
    blocks = {
        letter: (
            *frame.block("mixer", mixers[letter]),
            *frame.block("mlp", frame.feed_forward()),
        )
        for letter in sorted(set(config.pattern))
    }
    ops = (
        Table("embed", "vocab", "residual"),
        frame.norm("norm", "residual", "final", "final_gain"),
        *frame.head(bool(config.tie_word_embeddings)),
    )
    stacks = {"": Stack(tuple(config.pattern), blocks)}
    return assembled(
        frame.wires() | wires(config), ops, stacks, {EPS: config.layer_norm_eps}, config.initializer_range
    )


def wires(config: PreTrainedConfig) -> dict[str, Wire]:
    """Those of the mixers that are no attention."""
    heads = Wire(config.retention_num_heads, config.hidden_size // config.retention_num_heads)
    inner = config.expand * config.hidden_size
    ssm = Wire(config.mamba2_num_heads, inner // config.mamba2_num_heads)
    fixed = {
        "vocab": config.vocab_size,
        "taps": config.conv_kernel,
        "state": config.state_size,
        "rank": config.time_step_rank,
        "scan": config.time_step_rank + 2 * config.state_size,
        "bc": 2 * config.mamba2_n_groups * config.mamba2_state_size,
    }
    return {
        **{f"retention.{name}.{{}}": heads for name in ("query", "key", "value", "mixed", "out")},
        **{f"{name}.{{}}": ssm for name in ("ssm", "ssm_out", "ssm_gain")},
        "step.{}": Wire(config.mamba2_num_heads),
        "channel.{}": Wire(inner),
        "groups": Wire(config.mamba2_n_groups, config.mamba2_state_size, fixed=True),
        **{name: Wire(size, fixed=True) for name, size in fixed.items()},
    }


def retention(frame: Frame) -> tuple[Op, ...]:
    """Heads, each normed by itself, without gains, and gated."""
    module, bias = frame.module("mixer"), frame.biases[0]
    query, key, value, mixed, out = (
        f"retention.{name}.{{}}" for name in ("query", "key", "value", "mixed", "out")
    )
    parts = {"q": query, "k": key, "v": value, "g": out}
    return (
        *(Linear(f"{module}.{part}", frame.reads, wire, bias) for part, wire in parts.items()),
        Attention(query, key, value, mixed),
        Norm(f"{module}.norm", mixed, out, "", "rms", frame.eps, per="unit"),
        Pointwise((out,)),
        Linear(f"{module}.o", out, frame.writes, bias),
    )


def mamba(frame: Frame) -> tuple[Op, ...]:
    """Channels by themselves, but for what they share: steps, b and c."""
    module, channel = frame.module("mamba"), "channel.{}"
    own = (
        Weight(f"{module}.conv1d.weight", (channel, "taps")),
        Weight(f"{module}.conv1d.bias", (channel,)),
        Weight(f"{module}.A_log", (channel, "state")),
        Weight(f"{module}.D", (channel,)),
    )
    return (
        Linear(f"{module}.x", frame.reads, channel),
        Linear(f"{module}.z", frame.reads, channel),
        Pointwise((channel,), own=own),
        Linear(f"{module}.x_proj", channel, "scan"),
        Linear(f"{module}.dt_proj", "rank", channel, bias=True),
        Linear(f"{module}.out_proj", channel, frame.writes),
    )


def mamba2(frame: Frame) -> tuple[Op, ...]:
    """Heads with a step of their own; b and c are shared by all, and so is the norm."""
    module, ssm, step = frame.module("mamba2"), "ssm.{}", "step.{}"
    own = (
        Weight(f"{module}.conv1d.v.weight", (ssm, "taps")),
        Weight(f"{module}.conv1d.v.bias", (ssm,)),
        Weight(f"{module}.conv1d.bc.weight", ("bc", "taps")),
        Weight(f"{module}.conv1d.bc.bias", ("bc",)),
        *(Weight(f"{module}.{name}", (step,)) for name in ("dt_bias", "A_log", "D")),
    )
    return (
        Linear(f"{module}.z", frame.reads, ssm),
        Linear(f"{module}.v", frame.reads, ssm),
        Linear(f"{module}.bc", frame.reads, "bc"),
        Linear(f"{module}.dt", frame.reads, step),
        Pointwise((ssm,), own=own),
        Attention(ssm, "groups", ssm, ssm, along=(step,)),
        Norm(f"{module}.norm", ssm, "ssm_out.{}", "ssm_gain.{}", "rms", frame.eps),
        Linear(f"{module}.out_proj", "ssm_out.{}", frame.writes),
    )


def accepts(config: PreTrainedConfig) -> None:
    if "S" in config.pattern and config.mamba2_n_groups > 1:
        got, remedy = config.mamba2_n_groups, "groups of Mamba-2's heads have no table"
        raise refuse("mamba2_n_groups", "1", got, remedy)


def resized(old: PreTrainedConfig, new: PreTrainedConfig) -> Mapping[str, Any]:
    """Heads of the same size, each with the decay of the one that it copies."""
    out: dict[str, Any] = {}
    for letter, name, width in (
        ("R", "retention_num_heads", 1),
        ("S", "mamba2_num_heads", old.expand),
    ):
        if letter not in old.pattern or new.hidden_size == old.hidden_size:
            continue
        size = width * old.hidden_size // getattr(old, name)
        heads, rest = divmod(width * new.hidden_size, size)
        if rest:
            expected = f"a multiple of {size // width}, for heads of {size} in {name}"
            remedy = f"choose {new.hidden_size - rest // width}"
            raise refuse("hidden-size", expected, new.hidden_size, remedy)
        out[name] = heads
    if "retention_num_heads" in out:
        decays = log_decays(old.retention_num_heads, old.retention_log_decay).tolist()
        index = round_robin(len(decays), out["retention_num_heads"])
        out["retention_log_decay"] = [decays[i] for i in index]
    return out


LCI = Family(
    "lci",
    architecture,
    {
        "embed": Stored("model.embed_tokens"),
        "norm": Stored("model.norm"),
        "head": Stored("lm_head"),
        **block(
            "model.layers.{}.",
            {
                "mixer_norm": "mixer_norm",
                **{f"mixer.{part}": f"mixer.{part}_proj" for part in "qkvgo"},
                ("mamba.x", "mamba.z"): "mixer.in_proj",
                **{f"mamba.{name}": f"mixer.{name}" for name in ("x_proj", "dt_proj", "out_proj")},
                "mamba.conv1d.weight": "mixer.conv1d.weight",
                "mamba.conv1d.bias": "mixer.conv1d.bias",
                **{f"mamba.{name}": f"mixer.{name}" for name in ("A_log", "D")},
                ("mamba2.z", "mamba2.v", "mamba2.bc", "mamba2.dt"): "mixer.in_proj",
                ("mamba2.conv1d.v.weight", "mamba2.conv1d.bc.weight"): "mixer.conv1d.weight",
                ("mamba2.conv1d.v.bias", "mamba2.conv1d.bc.bias"): "mixer.conv1d.bias",
                **{f"mamba2.{name}": f"mixer.{name}" for name in ("dt_bias", "A_log", "D")},
                "mamba2.norm": "mixer.norm",
                "mamba2.out_proj": "mixer.out_proj",
                "mlp_norm": "mlp_norm",
                "mlp.up": "mlp.up_proj",
                "mlp.down": "mlp.down_proj",
            },
        ),
    },
    Fields(head_dim="head_dim"),
    accepts=accepts,
    # Layers that carry a state have none.
    positions=lambda config: all_positions(config) if "A" in config.pattern else None,
    lists=("pattern",),
    resized=resized,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
)
