"""The position-wise MLP of GPT-NeoX: two matrices with biases and one activation between them."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


class MLP(nn.Module):
    """down_proj(act(up_proj(x))): [B, T, hidden_size] -> [B, T, hidden_size]."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))
