"""The configuration of the one causal LM: a stack of blocks whose mixers are spelled by `pattern`."""

import math
import os
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lcikernels.ops.checks import refuse

# The cache layer each mixer needs.
CACHES = {"A": "full_attention", "R": "recurrent", "M": "recurrent", "S": "recurrent"}

# What lies beside a checkpoint for `trust_remote_code=True` where nobody imported this package. The import is
# in a `try`: what is imported outside one transformers asks for itself, without saying how to install it.
CODE = "modeling_lci"
SHIM = '''"""The classes of this checkpoint, which are those of lcikernels."""

try:
    from lcikernels.models import LCIConfig, LCIForCausalLM, LCIModel
except ImportError as error:
    raise ImportError(
        f"this checkpoint is made of lcikernels' layers: pip install 'lcikernels[growth]' ({error})"
    ) from error

__all__ = ["LCIConfig", "LCIForCausalLM", "LCIModel"]
'''
AUTO_MAP = {
    "AutoConfig": f"{CODE}.LCIConfig",
    "AutoModel": f"{CODE}.LCIModel",
    "AutoModelForCausalLM": f"{CODE}.LCIForCausalLM",
}


@strict
class LCIConfig(PreTrainedConfig):
    """A causal LM in GPT-NeoX's frame: LayerNorm with bias, an MLP of two matrices, rotary positions.

    `pattern` has one letter a layer: "A" softmax attention, "R" retention, "M" Mamba-1, "S" Mamba-2 (SSD);
    None is retention in every layer. With `use_parallel_residual` mixer and MLP read the same input, else the
    mixer comes first.

    Attention: `num_attention_heads` heads of `head_dim` (None: hidden_size / num_attention_heads).
    Retention: `retention_num_heads` heads (None: num_attention_heads) of hidden_size / retention_num_heads;
    `retention_log_decay` lists, one for each head of every layer and at most 0, the log of the share of its
    memory that a head keeps from token to token (None: RetNet's, log(1 - 2^(-5-h)) for head h).
    Both: `rope_parameters` holds rope_theta (10000) and partial_rotary_factor (1.0), the share of a head.
    Mamba-1: expand * hidden_size channels of `state_size`; time_step_rank "auto" is ceil(hidden_size / 16).
    Mamba-2: as many channels of `mamba2_state_size`, in `mamba2_num_heads` heads (None: of gcd(64, channels)
    channels) and `mamba2_n_groups` groups of heads; time_step_limit (0, inf) bounds a token's step.
    Both: a convolution of width conv_kernel.

    Raises ValueError where a letter, a length or a size does not fit.
    """

    model_type = "lci"
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    head_dim: int | None = None
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    attention_bias: bool = True
    use_parallel_residual: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    pattern: str | None = None
    retention_num_heads: int | None = None
    retention_log_decay: list[float] | None = None
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | str = "auto"
    mamba2_num_heads: int | None = None
    mamba2_state_size: int = 128
    mamba2_n_groups: int = 1
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)

    def __post_init__(self, **kwargs):
        if self.pattern is None:
            self.pattern = "R" * self.num_hidden_layers
        check_pattern(self.pattern, self.num_hidden_layers)
        if self.retention_num_heads is None:
            self.retention_num_heads = self.num_attention_heads
        check_heads(self, "R", "retention_num_heads")
        check_decays(self)
        if self.head_dim is None:
            check_heads(self, "A", "num_attention_heads")
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.time_step_rank == "auto":
            self.time_step_rank = -(-self.hidden_size // 16)
        if self.mamba2_num_heads is None:
            channels = self.expand * self.hidden_size
            self.mamba2_num_heads = channels // math.gcd(64, channels)
        self.time_step_limit = tuple(self.time_step_limit)
        check_mamba2(self)
        super().__post_init__(**kwargs)
        check_rotary(self)

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of every block, in the names `transformers.DynamicCache(config=...)` looks up."""
        return [CACHES[letter] for letter in self.pattern]

    @property
    def head_sizes(self) -> dict[str, int]:
        """The dims of a head of every mixer in `pattern` that has heads."""
        sizes = {}
        if "A" in self.pattern:
            sizes["A"] = self.head_dim
        if "R" in self.pattern:
            sizes["R"] = self.hidden_size // self.retention_num_heads
        return sizes

    @property
    def rotary_dims(self) -> dict[str, int]:
        """How many of these dims rotate."""
        share = self.rope_parameters.get("partial_rotary_factor", 1.0)
        return {letter: int(size * share) for letter, size in self.head_sizes.items()}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **options):
        """As transformers', and beside config.json the file by which an Auto class finds the classes here."""
        self.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, **options)
        Path(save_directory, f"{CODE}.py").write_text(SHIM, encoding="utf-8")
        if push_to_hub:  # by itself transformers' would push config.json alone
            self.push_to_hub(options.pop("repo_id", Path(save_directory).name), **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: `save_pretrained` writes what leads here, transformers would copy this one file."""

    def validate_layer_type(self):
        """Nothing: `check_pattern` did, and the inherited check knows transformers' own layers only."""


def check_pattern(pattern: str, num_layers: int) -> None:
    """ValueError unless `pattern` is `num_layers` letters out of A, R, M and S."""
    if len(pattern) != num_layers or not set(pattern) <= set(CACHES):
        letters = "letters out of A (attention), R (retention), M (Mamba) and S (Mamba-2)"
        got = f"{pattern!r} with {len(pattern)} letters"
        refuse("LCIConfig", "pattern", f"num_hidden_layers={num_layers} {letters}", got)


def check_heads(config: LCIConfig, letter: str, name: str) -> None:
    """ValueError where the mixer `letter` is in the pattern and its heads do not share hidden_size evenly."""
    count = getattr(config, name)
    if letter in config.pattern and (count < 1 or config.hidden_size % count):
        refuse("LCIConfig", name, f"a divisor of hidden_size={config.hidden_size}", count)


def check_decays(config: LCIConfig) -> None:
    """ValueError where retention is in the pattern and the listed decays are not one a head, each <= 0."""
    decays, H = config.retention_log_decay, config.retention_num_heads
    if "R" not in config.pattern or decays is None:
        return
    if len(decays) != H:
        expected = f"as many numbers as retention_num_heads={H}"
        refuse("LCIConfig", "retention_log_decay", expected, len(decays))
    least = torch.finfo(torch.float32).min  # what is beyond is -inf in a layer, and NaN at padding
    if wrong := [x for x in decays if not least <= x <= 0]:
        refuse("LCIConfig", "retention_log_decay", "finite numbers of float32, each <= 0", wrong[0])


def check_mamba2(config: LCIConfig) -> None:
    """ValueError where Mamba-2 is in the pattern and its heads, groups or steps do not fit."""
    if "S" not in config.pattern:
        return
    channels, limit = config.expand * config.hidden_size, config.time_step_limit
    heads, groups = config.mamba2_num_heads, config.mamba2_n_groups
    if heads < 1 or channels % heads:
        refuse("LCIConfig", "mamba2_num_heads", f"a divisor of expand * hidden_size={channels}", heads)
    if groups < 1 or heads % groups:
        refuse("LCIConfig", "mamba2_n_groups", f"a divisor of mamba2_num_heads={heads}", groups)
    if config.mamba2_state_size < 1:
        refuse("LCIConfig", "mamba2_state_size", "at least 1", config.mamba2_state_size)
    if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
        refuse("LCIConfig", "time_step_limit", "(least, most) with 0 <= least <= most", limit)


def check_rotary(config: LCIConfig) -> None:
    """ValueError where the rotary positions are of another kind, or their pairs do not fit a head.

    A model asks again: `rope_parameters` may change after construction.
    """
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type != "default":
        refuse("LCIConfig", "rope_parameters['rope_type']", "'default'", repr(rope_type))
    for letter, dims in config.rotary_dims.items():
        size = config.head_sizes[letter]
        if not 0 <= dims + dims % 2 <= size:
            expected = f"such that pairs of dims rotate within the {size} of a head of mixer {letter}"
            got = f"{dims} dims from {config.rope_parameters}"
            refuse("LCIConfig", "partial_rotary_factor", expected, got)
