"""Where tokens stand: the angles by which q and k of a mixer rotate, of every rope_type of transformers."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lcikernels.ops.checks import refuse


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
    heads = SimpleNamespace(
        head_dim=config.head_sizes[letter],
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope,
        standardize_rope_params=lambda: None,  # the config's own construction did it
    )
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
    transformers: of all its rows, and whatever a cache's keys were rotated by.
    """

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
        length = positions.max() + 1  # stays on the device: nothing waits for it
        if self.ropes[letter]["rope_type"] == "longrope":
            far = self.get_buffer(f"{letter}_long")
        else:
            far, _ = frequencies(self.config, letter, positions.device, length)
        return torch.where(length > trained, far, near)

    def check(self) -> None:
        """ValueError where the config's rope_parameters are others than at construction."""
        if (now := ropes(self.config)) != self.ropes:
            expected = "what the model was made with (from_pretrained takes other rope_parameters)"
            refuse("LCIModel", "config.rope_parameters", expected, now)


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
