"""The position-wise MLP: two matrices and one activation between them, or three of which one gates."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


class MLP(nn.Module):
    """[B, T, hidden_size] -> [B, T, hidden_size]: down_proj(act(up_proj(x))), or with `gated_mlp`

    down_proj(act(gate_proj(x)) * up_proj(x)).
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
