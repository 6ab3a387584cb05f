"""lcikernels' own models: in each layer attention (A, W), retention (R), Mamba (M) or Mamba-2 (S)."""

from collections.abc import Mapping
from fractions import Fraction
from math import gcd
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
from growth.maps import grouped, groups
from lcikernels.layers.retention import log_decays

EPS = "norm_eps"
LESS_ONE = "zero_centered_norms"
NORMED = ("mixer", "mixer_out", "mlp", "mlp_out", "mixer.q", "mixer.k")


def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
    frame = Frame(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kind=config.norm,
        eps=EPS,
        norms=config.norm_placement,
        gated=config.gated_mlp,
        qk_norm={None: "", "head": "unit", "all": "wire"}[config.qk_norm],
        biases=(*config.biases, config.mlp_bias),
    )
    attention = frame.attention()
    mixers = {
        "A": attention,
        "W": attention,
        "R": retention(frame, config.retention_learned_decay),
        "M": mamba(frame),
        "S": mamba2(frame),
    }
    blocks = {
        letter: (
            *frame.block("mixer", mixers[letter]),
            *frame.block("mlp", frame.feed_forward()),
        )
        for letter in sorted(set(config.pattern))
    }
    learned = config.position_embedding_type == "learned"
    ops = (
        Table("embed", "vocab", "residual", config.embedding_scale),
        *((Table("positions", "positions", "residual"),) if learned else ()),
        frame.norm("norm", "residual", "final", "final_gain"),
        *frame.head(bool(config.tie_word_embeddings)),
    )
    stacks = {"": Stack(tuple(config.pattern), blocks)}
    return assembled(
        frame.wires() | wires(config), ops, stacks, {EPS: config.norm_eps}, config.initializer_range
    )


def wires(config: PreTrainedConfig) -> dict[str, Wire]:
    """Those of the mixers that are no attention."""
    H, Hk, size = config.heads_of("R")
    heads, keys = Wire(H, size), Wire(Hk, size)
    inner = config.channels
    ssm = Wire(config.mamba2_num_heads, inner // config.mamba2_num_heads)
    fixed = {
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "retention.head": size,
        "taps": config.conv_kernel,
        "state": config.state_size,
        "rank": config.time_step_rank,
        "scan": config.time_step_rank + 2 * config.state_size,
        "bc": 2 * config.mamba2_n_groups * config.mamba2_state_size,
    }
    return {
        **{f"retention.{name}.{{}}": heads for name in ("query", "query_raw", "query_gain", "mixed", "out")},
        **{f"retention.{name}.{{}}": keys for name in ("key", "key_raw", "key_gain", "value")},
        "decay.{}": Wire(H),
        **{f"{name}.{{}}": ssm for name in ("ssm", "ssm_out", "ssm_gain")},
        "step.{}": Wire(config.mamba2_num_heads),
        "channel.{}": Wire(inner),
        "groups": Wire(config.mamba2_n_groups, config.mamba2_state_size, fixed=True),
        **{name: Wire(size, fixed=True) for name, size in fixed.items()},
    }


def retention(frame: Frame, learned: bool) -> tuple[Op, ...]:
    """Heads, each normed by itself, without gains, and gated; a decay for each that is learned or not."""
    module, (bias, out_bias, _) = frame.module("mixer"), frame.biases
    query, key, value, mixed, out = (
        f"retention.{name}.{{}}" for name in ("query", "key", "value", "mixed", "out")
    )
    decay = "decay.{}"
    return (
        *frame.projections("mixer", "retention"),
        Linear(f"{module}.g", frame.reads, out, bias),
        *((Pointwise((decay,), own=(Weight(f"{module}.A_log", (decay,)),)),) if learned else ()),
        Attention(query, key, value, mixed, along=(decay,) if learned else (), in_turn=not learned),
        Norm(f"{module}.norm", mixed, out, "", "rms", frame.eps, per="unit"),
        Pointwise((out,)),
        Linear(f"{module}.o", out, frame.writes, out_bias),
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


def positions(config: PreTrainedConfig) -> int | None:
    """Layers that carry a state have no limit, but a table of positions has."""
    limited = set(config.layer_types) != {"recurrent"} or config.position_embedding_type == "learned"
    return all_positions(config) if limited else None


def resized(old: PreTrainedConfig, new: PreTrainedConfig) -> Mapping[str, Any]:
    """Heads of the same size, each with the decay of the one that it copies."""
    out: dict[str, Any] = {}
    if new.hidden_size == old.hidden_size:
        return out
    if "R" in old.pattern:
        out |= _retention_heads(old, new)
    if "S" in old.pattern:
        if old.mamba2_n_groups > 1:
            got, remedy = old.mamba2_n_groups, "groups of heads grow in depth alone: leave the width as it is"
            raise refuse("mamba2_n_groups", "1", got, remedy)
        size = old.channels // old.mamba2_num_heads
        out["mamba2_num_heads"] = _whole(old, new, "mamba2_num_heads", size, old.expand)
    return out


def _retention_heads(old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, Any]:
    Q, _, size = old.heads_of("R")
    if Q * size == old.hidden_size:
        P = _whole(old, new, "retention_num_heads", size, 1)
    else:
        P, rest = divmod(Q * new.hidden_size, old.hidden_size)
        P = Q if rest else P
    out: dict[str, Any] = {"retention_num_heads": P}
    G = H = old.retention_num_kv_heads
    if G is not None:
        out["retention_num_kv_heads"] = H = groups(Q, G, P)
    if not (old.retention_learned_decay and old.retention_log_decay is None):
        decays = log_decays(Q, old.retention_log_decay).tolist()
        out["retention_log_decay"] = [decays[i] for i in grouped((Q, P), (G or Q, H or P))]
    return out


def by_unit(config: PreTrainedConfig) -> Mapping[str, tuple[str, list]]:
    """The decays of retention's heads, where they are not a weight."""
    learned = config.retention_learned_decay and config.retention_log_decay is None
    if "R" not in config.pattern or learned:
        return {}
    decays = log_decays(config.heads_of("R")[0], config.retention_log_decay).tolist()
    return {"retention_log_decay": ("retention.query.{}", decays)}


def _whole(old: PreTrainedConfig, new: PreTrainedConfig, name: str, size: int, width: float) -> int:
    """How many heads of `size` make up `width` times the new hidden size."""
    share = Fraction(width).limit_denominator(10**6)
    each = size * share.denominator // gcd(share.numerator, size * share.denominator)
    if rest := new.hidden_size % each:
        expected = f"a multiple of {each}, for heads of {size} in {name}"
        raise refuse("hidden-size", expected, new.hidden_size, f"choose {new.hidden_size - rest}")
    return int(share * new.hidden_size) // size


LCI = Family(
    "lci",
    architecture,
    {
        "embed": Stored("model.embed_tokens"),
        "positions": Stored("model.embed_positions"),
        "norm": Stored("model.norm", less_one=LESS_ONE),
        "head": Stored("lm_head"),
        **block(
            "model.layers.{}.",
            {
                **{f"{name}_norm": Stored(f"{name}_norm", less_one=LESS_ONE) for name in NORMED},
                "mixer.A_log": "mixer.A_log",
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
                **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
            },
        ),
    },
    Fields(kv_heads="num_key_value_heads", head_dim="head_dim"),
    positions=positions,
    lists=("pattern",),
    layer_numbers=("no_rope_layers",),
    resized=resized,
    by_unit=by_unit,
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    numbered="scale_attention_by_layer",
)
