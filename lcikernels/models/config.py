"""The configuration of the one causal LM: a stack of blocks whose mixers are spelled by `pattern`."""

import math
import os
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lcikernels.models import fields
from lcikernels.models.fields import ATTENTION, CACHES, ROPE_OF, ROPES, nested

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
    """A causal LM: a residual stream, in every layer a mixer and an MLP. Left alone it is GPT-NeoX's frame.

    `pattern` has one letter a layer: "A" softmax attention, "W" the same over the last `sliding_window`
    tokens, "R" retention, "M" Mamba-1, "S" Mamba-2 (SSD); None is retention in every layer.

    Stream: `norm` "layer" (LayerNorm) or "rms", of norm_eps; zero_centered_norms stores the gains of all
    RMSNorms less one. norm_placement "before": a block reads a norm of the stream; "around": and its output
    is normed before it is added; "inside": only that, the block reads the stream. With use_parallel_residual
    mixer and MLP read the same input, else the mixer comes first. What they add is multiplied by
    residual_scale, the embedding by embedding_scale, rounded to its dtype, the logits by logits_scale;
    final_softcap c gives c tanh(logits / c). MLP: down(act(up(x))), or down(act(gate(x)) * up(x)) with
    gated_mlp.

    Attention: num_attention_heads heads of head_dim (None: hidden_size / num_attention_heads), which share
    num_key_value_heads (None: as many) of keys and values. Scores are multiplied by attention_scale (None:
    head_dim ** -0.5), with scale_attention_by_layer by 1 / (layer + 1) too; attention_softcap as the final
    one.
    Retention: retention_num_heads heads (None: num_attention_heads) of retention_head_dim (None:
    hidden_size / retention_num_heads), keys and values retention_num_kv_heads (None: as many).
    `retention_log_decay` lists, one for each head of every layer and at most 0, the log of the share of its
    memory that a head keeps from token to token (None: RetNet's, log(1 - 2^(-5-h)) for head h), from which
    retention_learned_decay starts.
    Both: attention_bias is of q, k, v (and g), attention_out_bias of o (None: as attention_bias). qk_norm: an
    RMSNorm of q and k before they rotate, of each "head", or of "all" heads as one.

    Positions: position_embedding_type "rope"; "learned", a table of max_position_embeddings that is added to
    the embedding; or "none". rope_parameters are transformers' of every rope_type, or two such under
    "full_attention" (A, R) and "sliding_attention" (W); partial_rotary_factor is the share of a head that
    rotates, no_rope_layers the layers, from 0, where nothing does.

    Mamba-1: expand * hidden_size channels of `state_size`; time_step_rank "auto" is ceil(hidden_size / 16).
    Mamba-2: as many channels of `mamba2_state_size`, in `mamba2_num_heads` heads (None: of gcd(64, channels)
    channels) and `mamba2_n_groups` groups of heads; time_step_limit (0, inf) bounds a token's step.
    Both: a convolution of width conv_kernel; expand * hidden_size must be whole.

    `layer_norm_eps` is another name of norm_eps, which it had. Raises ValueError, which names the field,
    where a letter, a length, a size or a word does not fit.
    """

    model_type = "lci"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {"layer_norm_eps": "norm_eps"}
    _rope_type_labels = tuple(ROPES)  # transformers then finds them under these names in every pattern

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    mlp_bias: bool = True
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_placement: str = "before"
    zero_centered_norms: bool = False
    use_parallel_residual: bool = True
    embedding_scale: float | int = 1.0
    residual_scale: float | int = 1.0
    logits_scale: float | int = 1.0
    final_softcap: float | int | None = None
    attention_bias: bool = True
    attention_out_bias: bool | None = None
    attention_scale: float | int | None = None
    scale_attention_by_layer: bool = False
    attention_softcap: float | int | None = None
    sliding_window: int | None = None
    qk_norm: str | None = None
    max_position_embeddings: int = 2048
    position_embedding_type: str = "rope"
    rope_parameters: dict | None = None
    no_rope_layers: list[int] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    pattern: str | None = None
    retention_num_heads: int | None = None
    retention_num_kv_heads: int | None = None
    retention_head_dim: int | None = None
    retention_log_decay: list[float] | None = None
    retention_learned_decay: bool = False
    state_size: int = 16
    conv_kernel: int = 4
    expand: float | int = 2
    time_step_rank: int | str = "auto"
    mamba2_num_heads: int | None = None
    mamba2_state_size: int = 128
    mamba2_n_groups: int = 1
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)

    def __post_init__(self, **kwargs):
        if self.pattern is None:
            self.pattern = "R" * self.num_hidden_layers
        fields.check_pattern(self)
        if self.retention_num_heads is None:
            self.retention_num_heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        fields.check_sizes(self)
        if self.head_dim is None:
            fields.check_attention_heads(self)
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.time_step_rank == "auto":
            self.time_step_rank = -(-self.hidden_size // 16)
        if self.mamba2_num_heads is None:
            fields.check_channels(self)
            self.mamba2_num_heads = self.channels // math.gcd(64, self.channels)
        self.time_step_limit = tuple(self.time_step_limit)
        fields.check_nesting(self)
        super().__post_init__(**kwargs)
        fields.check(self)

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of every block, in the names `transformers.DynamicCache(config=...)` looks up."""
        return [CACHES[letter] for letter in self.pattern]

    @property
    def head_sizes(self) -> dict[str, int]:
        """The dims of a head of every mixer in `pattern` that has heads, of q and k."""
        return {letter: self.heads_of(letter)[2] for letter in ROPE_OF if letter in self.pattern}

    def heads_of(self, letter: str) -> tuple[int, int, int]:
        """Of attention or retention, be it in `pattern` or not: heads, those of keys and values, the dims of
        one."""
        if letter in ATTENTION:
            return self.num_attention_heads, self.num_key_value_heads, self.head_dim
        H = self.retention_num_heads
        size = self.retention_head_dim or self.hidden_size // max(1, H)
        return H, self.retention_num_kv_heads or H, size

    @property
    def channels(self) -> int:
        """Of either Mamba."""
        return round(self.expand * self.hidden_size)

    @property
    def biases(self) -> tuple[bool, bool]:
        """Of q, k, v (and g), and of o."""
        out = self.attention_out_bias
        return self.attention_bias, self.attention_bias if out is None else out

    @property
    def rotary_dims(self) -> dict[str, int]:
        """How many of these dims rotate."""
        shares = {
            letter: self.rope_of(letter).get("partial_rotary_factor", 1.0) for letter in self.head_sizes
        }
        return {letter: int(size * shares[letter]) for letter, size in self.head_sizes.items()}

    def rope_of(self, letter: str) -> dict:
        """The rope_parameters by which a mixer rotates; of no dims where nothing does."""
        if self.position_embedding_type != "rope":
            return {"partial_rotary_factor": 0.0}
        given = self.rope_parameters or {}
        return given[ROPE_OF[letter]] if nested(given) else given

    def rotates(self, layer_idx: int) -> bool:
        """Whether q and k of that layer, if it has any, rotate."""
        rope = self.position_embedding_type == "rope"
        return rope and layer_idx not in (self.no_rope_layers or ())

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
