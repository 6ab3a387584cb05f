"""What the fields of an LCIConfig must be, and be to each other: each refusal names its field."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lcikernels.ops import checks

# The cache layer that each mixer needs.
ATTENTION = {"A": "full_attention", "W": "sliding_attention"}
CACHES = ATTENTION | dict.fromkeys("RMS", "recurrent")
# What rope_parameters may be nested under, and whose entry a mixer rotates by.
ROPES = ("full_attention", "sliding_attention")
ROPE_OF = ATTENTION | {"R": "full_attention"}

WORDS = {
    "norm": ("layer", "rms"),
    "norm_placement": ("before", "around", "inside"),
    "qk_norm": (None, "head", "all"),
    "position_embedding_type": ("rope", "learned", "none"),
}
POSITIVE = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "conv_kernel")
POSITIVE += ("state_size", "time_step_rank", "retention_head_dim")
SCALES = ("embedding_scale", "residual_scale", "logits_scale", "attention_scale", "attention_softcap")
SCALES += ("final_softcap",)
# The numbers that a rope_type cannot do without; original_max_position_embeddings transformers fills in.
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}


def refuse(field: str, expected: str, got: object) -> None:
    checks.refuse("LCIConfig", field, expected, got)


def check(config: PreTrainedConfig) -> None:
    """ValueError where a field does not fit."""
    for field, words in WORDS.items():
        checks.one_of("LCIConfig", field, getattr(config, field), words)
    if config.hidden_act not in ACT2FN:
        refuse("hidden_act", "an activation that transformers knows", repr(config.hidden_act))
    for field in SCALES:
        if (scale := getattr(config, field)) is not None and not 0 < scale < math.inf:
            refuse(field, "above 0, and finite", scale)
    if not 0 <= config.norm_eps < math.inf:
        refuse("norm_eps", "at least 0, and finite", config.norm_eps)
    if config.zero_centered_norms and config.norm != "rms":
        refuse("zero_centered_norms", "False where norm is 'layer'", True)
    check_attention(config)
    check_retention(config)
    check_mamba2(config)
    if config.position_embedding_type == "rope":
        check_rope(config)


def check_sizes(config: PreTrainedConfig) -> None:
    """What others are reckoned from must be there."""
    for field in POSITIVE:
        size = getattr(config, field)
        if isinstance(size, int) and size < 1:
            refuse(field, "at least 1", size)


def check_pattern(config: PreTrainedConfig) -> None:
    """`pattern` must be a letter a layer; no_rope_layers must be layers."""
    pattern, count = config.pattern, config.num_hidden_layers
    if len(pattern) != count or not set(pattern) <= set(CACHES):
        letters = "letters out of A (attention), W (with a window), R (retention), M (Mamba) and S (Mamba-2)"
        got = f"{pattern!r} with {len(pattern)} letters"
        refuse("pattern", f"num_hidden_layers={count} {letters}", got)
    listed = config.no_rope_layers or []
    if len(set(listed)) != len(listed) or not set(listed) <= set(range(count)):
        refuse("no_rope_layers", f"layers from 0 to {count - 1}, each once", listed)


def check_attention_heads(config: PreTrainedConfig) -> None:
    """Where their size is not given, heads of attention must share hidden_size evenly."""
    if set(config.pattern) & set(ATTENTION):
        count, size = config.num_attention_heads, config.hidden_size
        if count < 1 or size % count:
            expected = f"a divisor of hidden_size={size} where head_dim is not given"
            refuse("num_attention_heads", expected, count)


def check_attention(config: PreTrainedConfig) -> None:
    """Heads and windows of attention, where there is any."""
    letters, H = set(config.pattern) & set(ATTENTION), config.num_attention_heads
    if not letters:
        return
    for field in ("num_attention_heads", "head_dim"):
        if (count := getattr(config, field)) < 1:
            refuse(field, "at least 1", count)
    if (count := config.num_key_value_heads) < 1 or H % count:
        refuse("num_key_value_heads", f"a divisor of num_attention_heads={H}", count)
    window = config.sliding_window
    if "W" in letters and (window is None or window < 2):
        # transformers' caches keep window - 1 tokens, and of 0 tokens they make all
        refuse("sliding_window", "at least 2 where the pattern has W", window)


def check_retention(config: PreTrainedConfig) -> None:
    """Heads and decays of retention, where there is any."""
    if "R" not in config.pattern:
        return
    H, size, decays = config.retention_num_heads, config.hidden_size, config.retention_log_decay
    if H < 1 or (config.retention_head_dim is None and size % H):
        expected = f"a divisor of hidden_size={size} where retention_head_dim is not given"
        refuse("retention_num_heads", expected, H)
    if (count := config.retention_num_kv_heads) is not None and (count < 1 or H % count):
        refuse("retention_num_kv_heads", f"a divisor of retention_num_heads={H}", count)
    if decays is None:
        return
    if len(decays) != H:
        refuse("retention_log_decay", f"as many numbers as retention_num_heads={H}", len(decays))
    least = torch.finfo(torch.float32).min  # what is beyond is -inf in a layer, and NaN at padding
    if wrong := [x for x in decays if not least <= x <= 0]:
        refuse("retention_log_decay", "finite numbers of float32, each <= 0", wrong[0])
    if config.retention_learned_decay and 0 in decays:
        refuse("retention_log_decay", "below 0 in every head with retention_learned_decay", 0.0)


def check_channels(config: PreTrainedConfig) -> None:
    """expand * hidden_size must be whole where a Mamba is in the pattern."""
    product, count = config.expand * config.hidden_size, config.channels
    if set(config.pattern) & set("MS") and (count < 1 or abs(product - count) > 1e-6 * count):
        expected = f"such that expand * hidden_size={config.hidden_size} is a whole number of channels"
        refuse("expand", expected, config.expand)


def check_mamba2(config: PreTrainedConfig) -> None:
    """Heads, groups and steps of Mamba-2, where there is any."""
    check_channels(config)
    inner, limit = config.channels, config.time_step_limit
    if "S" not in config.pattern:
        return
    heads, groups = config.mamba2_num_heads, config.mamba2_n_groups
    if heads < 1 or inner % heads:
        refuse("mamba2_num_heads", f"a divisor of expand * hidden_size={inner}", heads)
    if groups < 1 or heads % groups:
        refuse("mamba2_n_groups", f"a divisor of mamba2_num_heads={heads}", groups)
    if config.mamba2_state_size < 1:
        refuse("mamba2_state_size", "at least 1", config.mamba2_state_size)
    if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
        refuse("time_step_limit", "(least, most) with 0 <= least <= most", limit)


def nested(rope_parameters: dict) -> bool:
    """Whether they are given for each type of layer."""
    return any(name in rope_parameters for name in ROPES)


def check_nesting(config: PreTrainedConfig) -> None:
    """What is under the name of a type of layer must be its rope_parameters."""
    given = config.rope_parameters or {}
    for name in set(ROPES) & set(given):
        if given[name] is not None and not isinstance(given[name], dict):
            refuse(f"rope_parameters[{name!r}]", "a dict", repr(given[name]))


def check_rope(config: PreTrainedConfig) -> None:
    """rope_parameters must be of a known type, complete, and its pairs must fit the heads that rotate."""
    given, letters = config.rope_parameters, list(config.head_sizes)
    if nested(given):
        for name in {ROPE_OF[letter] for letter in letters}:
            if not isinstance(given.get(name), dict):
                refuse(
                    f"rope_parameters[{name!r}]", "given, for the pattern has such layers", given.get(name)
                )
    for letter in letters:
        check_rope_of(config, letter, config.rope_of(letter))


def check_rope_of(config: PreTrainedConfig, letter: str, rope: dict) -> None:
    """The same of one mixer."""
    kind, size, dims = rope.get("rope_type", "default"), config.head_sizes[letter], config.rotary_dims[letter]
    if kind not in ROPE_NUMBERS or kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        refuse("rope_parameters['rope_type']", " or ".join(map(repr, ROPE_NUMBERS)), repr(kind))
    for name in ("rope_theta", *ROPE_NUMBERS[kind]):
        if not _number(rope.get(name), lambda x: 0 < x < math.inf):
            refuse(f"rope_parameters[{name!r}]", "a number above 0", repr(rope.get(name)))
    if not 0 <= dims + dims % 2 <= size:
        expected = f"such that pairs of dims rotate within the {size} of a head of mixer {letter}"
        refuse("partial_rotary_factor", expected, f"{dims} dims from {rope}")
    if kind == "dynamic" and dims <= 2:
        refuse("partial_rotary_factor", "such that more than 2 dims rotate with 'dynamic'", f"{dims} dims")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = rope.get(name)
        fits = isinstance(factors, (list, tuple)) and len(factors) == -(-dims // 2)
        if not fits or not all(_number(x, lambda x: 0 < x < math.inf) for x in factors):
            expected = f"{-(-dims // 2)} numbers above 0, one for each pair of a head of mixer {letter}"
            refuse(f"rope_parameters[{name!r}]", expected, factors)


def _number(x: Any, fits: Callable[[float], bool]) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and fits(x)
