"""Where tokens stand: the angles by which q and k of a mixer rotate, of every rope_type of transformers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lcikernels.ops.checks import refuse


class Heads(NamedTuple):
    """What transformers' functions read of a configuration: that of one mixer's heads."""

    head_dim: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    rope_parameters: dict

    def standardize_rope_params(self) -> None:
        """Nothing: the configuration's own construction did it."""


def frequencies(
    config: PreTrainedConfig,
    letter: str,
    device: torch.device | None = None,
    length: Tensor | int | None = None,
) -> tuple[Tensor, float]:
    """Radians a token of each pair of dims, float32 [P], and the factor of cos and sin, of one mixer's heads.

    length: of the text, where the rope_type ("dynamic", "longrope") depends on it; None: a trained one.
    """
    rope, dims = config.rope_of(letter), config.rotary_dims[letter]
    if (kind := rope.get("rope_type", "default")) == "default":
        steps = torch.arange(0, dims, 2, dtype=torch.float32, device=device)
        return 1.0 / rope["rope_theta"] ** (steps / dims), 1.0
    sizes = (config.head_sizes[letter], config.hidden_size, config.num_attention_heads)
    heads = Heads(*sizes, config.max_position_embeddings, rope)
    return ROPE_INIT_FUNCTIONS[kind](heads, device, seq_len=length)


def trained_length(config: PreTrainedConfig, rope: dict) -> int | None:
    """The length beyond which the angles of every token change; None where they never do."""
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        return config.max_position_embeddings
    return rope["original_max_position_embeddings"] if kind == "longrope" else None


class Rotary(nn.Module):
    """cos and sin of the angles at positions, for every mixer of the config that rotates.

    Beyond their trained length, "dynamic" and "longrope" follow the last position of a call, as in
    transformers: of all its rows, and whatever a cache's keys were rotated by. `ahead` is the length of the
    text whose first part is read, where more of it follows.
    """

    ahead: Tensor | int = 0

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config, self.ropes, self.factors = config, ropes(config), {}
        for name, value in self.values().items():
            self.register_buffer(name, value, persistent=False)
        for letter in self.ropes:
            self.factors[letter] = frequencies(config, letter)[1]

    def values(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """What each buffer holds."""
        out = {}
        for letter, rope in self.ropes.items():
            out[letter] = frequencies(self.config, letter, device)[0]
            if rope["rope_type"] == "longrope":
                beyond = rope["original_max_position_embeddings"] + 1
                out[f"{letter}_long"] = frequencies(self.config, letter, device, beyond)[0]
        return out

    def _apply(self, fn, recurse: bool = True):
        # The buffers follow devices, not dtypes: bfloat16 would put an angle off by 0.4 %.
        super()._apply(fn, recurse)
        for name, value in self.values(next(self.buffers()).device if self.ropes else None).items():
            setattr(self, name, value)
        return self

    def forward(self, letter: str, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B, T], integers.  Returns two [B, T, 1, P] in `dtype`, computed in float32."""
        angles = positions[:, :, None, None].float() * self.radians(letter, positions)
        factor = self.factors[letter]
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def radians(self, letter: str, positions: Tensor) -> Tensor:
        """A token, of each pair: the buffer, or what replaces it beyond the trained length."""
        near = self.get_buffer(letter)
        if (trained := trained_length(self.config, self.ropes[letter])) is None:
            return near
        length = (positions.max() + 1).clamp(min=self.ahead)  # stays on the device: nothing waits for it
        if self.ropes[letter]["rope_type"] == "longrope":
            far = self.get_buffer(f"{letter}_long")
        else:
            far, _ = frequencies(self.config, letter, positions.device, length)
        return torch.where(length > trained, far, near)

    def turns(self, ids: Tensor, cache: Cache | None, new: int, attention_mask: Tensor | None) -> bool:
        """Whether the last `new` of ids [B, past + new] make "longrope" take its long factors for all tokens,
        where the cache holds keys of the short ones.

        ValueError where it does and ids hold no more than these new ones.
        """
        kinds = [rope for rope in self.ropes.values() if rope["rope_type"] == "longrope"]
        past = int(cache.get_seq_length()) if kinds and cache is not None else 0
        length = text_length(past + new, attention_mask)
        trained = {rope["original_max_position_embeddings"] for rope in kinds}
        if not past or not any(length - new <= x < length for x in trained):
            return False
        if ids.shape[1] != past + new:
            expected = (
                f"the whole text where it grows past {min(trained)} tokens, for all then turn otherwise"
            )
            refuse("LCIForCausalLM", "input_ids", expected, f"its last {ids.shape[1]}")
        return True

    def check(self) -> None:
        """ValueError where the config's rope_parameters are others than at construction."""
        if (now := ropes(self.config)) != self.ropes:
            expected = "what the model was made with (from_pretrained takes other rope_parameters)"
            refuse("LCIModel", "config.rope_parameters", expected, now)


def text_length(T: int, attention_mask: Tensor | None) -> int:
    """The tokens of the longest row, without padding: of T, or of the mask's where it is [B, T]."""
    two = attention_mask is not None and attention_mask.dim() == 2
    return int(attention_mask.sum(1).max()) if two else T


def ropes(config: PreTrainedConfig) -> dict[str, dict]:
    """The rope_parameters of each mixer that rotates; a copy."""
    if config.position_embedding_type != "rope":
        return {}
    return {letter: {"rope_type": "default", **config.rope_of(letter)} for letter in config.head_sizes}


def check_places(positions: Tensor, rows: int) -> None:
    """ValueError where a position is beyond a table of that many rows; read where nothing waits for it."""
    if positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel():
        if (last := int(positions.max())) >= rows:
            expected = f"below max_position_embeddings={rows}, as many as there are learned positions"
            refuse("LCIModel", "position_ids", expected, last)
