"""Lightning attention (Qin et al. 2024; MiniMax-01, 2025, section 2.2): retention whose decays are slopes."""

from typing import Any

import torch
from torch import Tensor, nn

from lcikernels.layers.layer import Layer, State, check_input, place_of_state, xavier
from lcikernels.layers.norm import GatedNorm
from lcikernels.layers.retention import retain
from lcikernels.ops import checks


def slopes(H: int, layer_idx: int, num_layers: int, device: torch.device | None = None) -> Tensor:
    """As LightningAttention says, for h = 0 .. H-1, float32 [H]; a little more, so that none is 0."""
    heads = torch.arange(1, H + 1, dtype=torch.float32, device=device)
    return torch.exp2(heads * (-8 / H)) * (1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5)


class LightningAttention(Layer):
    """out_proj(rms_norm(o) * sigmoid(output_gate(x))), where o is the retention of H heads of K = head_dim:

        q, k, v = silu(qkv_proj(x)), a head's three side by side
        S[t] = exp(-slope) S[t-1] + k[t] ⊗ v[t];  o[t] = q[t] · S[t]
        slope = 2 ** (-8 (h+1) / H) * (1 - layer_idx / (num_layers - 1))          of head h, counted from 0

    head_dim is hidden_size / num_heads unless given; the slopes are ALiBi's in layer 0 of num_layers and fall
    to 1e-5 of that in the last, float32 whatever the layer is turned into; the norm is one over all heads, of
    eps norm_eps. No projection has a bias, and there are no positions but the order. The state dict of
    transformers' MiniMaxLightningAttention loads, whose slopes must be those of this layer.

    forward(x [B, T, hidden_size]) gives y like x, and with return_state (y, state), the state after x. Given
    a state x counts on from it, and it stays as it is. cu_seqlens [N+1], integers, B = 1: x holds N sequences
    one after another, n at tokens cu_seqlens[n] to cu_seqlens[n+1], and states are those of N rows.
    keep bool [B, T] is False at tokens that leave no trace (padding), whose y means nothing.

    A state is State(recurrent [B, H, K, K]), float32, or float64 in a layer of that.
    Raises ValueError where a size, shape or dtype does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        layer_idx: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_layers": num_layers}
        checks.positive("LightningAttention", **sizes, head_dim=1 if head_dim is None else head_dim)
        if head_dim is None and hidden_size % num_heads:
            expected = f"a divisor of hidden_size={hidden_size} where head_dim is not given"
            checks.refuse("LightningAttention", "num_heads", expected, num_heads)
        if not 0 <= layer_idx < num_layers:
            expected = f"from 0 to num_layers - 1 = {num_layers - 1}"
            checks.refuse("LightningAttention", "layer_idx", expected, layer_idx)
        K = hidden_size // num_heads if head_dim is None else head_dim
        D, place = num_heads * K, {"device": device, "dtype": dtype}
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.qkv_proj = nn.Linear(hidden_size, 3 * D, bias=False, **place)
        self.norm = GatedNorm(D, norm_eps, activation="sigmoid", **place)
        self.output_gate = nn.Linear(hidden_size, D, bias=False, **place)
        self.out_proj = nn.Linear(D, hidden_size, bias=False, **place)
        decays = -slopes(num_heads, layer_idx, num_layers, device)
        self.register_buffer("log_decay", decays, persistent=False)
        self.register_load_state_dict_pre_hook(check_slopes)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, layer_idx: int) -> "LightningAttention":
        """The layer of that number in a MiniMaxConfig's model."""
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            layer_idx=layer_idx,
            num_layers=config.num_hidden_layers,
        )

    def _apply(self, fn, recurse: bool = True):
        # The buffer follows devices, not dtypes: bfloat16 would put the rates off by up to 0.4 %.
        super()._apply(fn, recurse)
        sizes = self.num_heads, self.layer_idx, self.num_layers
        self.log_decay = -slopes(*sizes, self.log_decay.device)
        return self

    def initial_values(self) -> dict[str, Tensor]:
        """As published: Xavier's matrices, gains of 1."""
        values = {
            f"{name}.weight": xavier(getattr(self, name).weight)
            for name in ("qkv_proj", "output_gate", "out_proj")
        }
        return values | {"norm.weight": torch.ones_like(self.norm.weight)}

    def allocate_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token of `batch_size` rows: zeros."""
        weight, H = self.out_proj.weight, self.num_heads
        K = weight.shape[1] // H
        return State(torch.zeros(batch_size, H, K, K, **place_of_state(weight, device, dtype)))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        check_input(self, x, state, cu_seqlens, keep)
        qkv = nn.functional.silu(self.qkv_proj(x)).unflatten(-1, (self.num_heads, -1))
        log_decay = self.log_decay.to(torch.promote_types(qkv.dtype, torch.float32))
        recurrent = None if state is None else state.recurrent
        o, recurrent = retain(*qkv.chunk(3, dim=-1), log_decay, recurrent, cu_seqlens, keep, scale=1.0)
        y = self.out_proj(self.norm(o.flatten(-2), self.output_gate(x)))
        return (y, State(recurrent)) if return_state else y


def check_slopes(layer: LightningAttention, weights: dict[str, Tensor], prefix: str, *_) -> None:
    """Leave out transformers' buffers, which follow from the slopes, if those are the layer's.

    bfloat16 puts a stored slope off by 0.4 %; the next layer's is off by 1 / num_layers.
    """
    for name in ("query_decay", "key_decay", "diagonal_decay"):
        weights.pop(f"{prefix}{name}", None)
    stored = weights.pop(f"{prefix}slope_rate", None)
    if stored is None:
        return
    H, layer_idx, L = layer.num_heads, layer.layer_idx, layer.num_layers
    own = slopes(H, layer_idx, L, stored.device)
    if stored.numel() != H or not torch.allclose(stored.flatten().float(), own, rtol=0.004, atol=0):
        expected = f"the slopes of layer_idx={layer_idx} of num_layers={L}, {own.tolist()[:4]} .."
        checks.refuse("LightningAttention", "slope_rate", expected, stored.flatten().tolist()[:4])
