"""The selective state space mixer, Mamba-1 (Gu and Dao 2023, section 3.4)."""

import math

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from lcikernels.layers.state import decodes
from lcikernels.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

DT_MIN, DT_MAX = 1e-3, 1e-1            # a fresh model's channels remember for about 1 / dt tokens: 10 to 1000
NO_STEP = -1e4                         # softplus(NO_STEP) is 0 and gives no gradient; fits float16


class CausalConv1d(nn.Module):
    """Holds the taps of a depthwise causal convolution: weight [D, W], bias [D]."""

    def __init__(self, D: int, W: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D, W))
        self.bias = nn.Parameter(torch.empty(D))


class Mamba(nn.Module):
    """out_proj(selective_scan(silu(conv1d(u))) * silu(z)), with (u, z) = in_proj(x), D = expand * hidden_size channels.

        (dt, b, c) = x_proj(u);  dt = softplus(dt_proj(dt));  a = -exp(A_log);  skip u * D

    x [B, T, hidden_size]; keep [B, T], where given, is False at tokens that leave no trace in the states (padding);
    past_key_values, where given, is advanced by T tokens. There are no positions; `rotary` is not read.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        D, N, R = config.expand * config.hidden_size, config.state_size, config.time_step_rank
        self.sizes = (R, N, N)
        self.in_proj = nn.Linear(config.hidden_size, 2 * D, bias=False)
        self.conv1d = CausalConv1d(D, config.conv_kernel)
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, D)
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, config.hidden_size, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """a = -1 .. -N in every channel, dt log-uniform in [1e-3, 0.1], the rest uniform in +- fan_in ** -0.5."""
        for weight in (self.in_proj.weight, self.conv1d.weight, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight):
            init.kaiming_uniform_(weight, a=math.sqrt(5))
        init.zeros_(self.conv1d.bias)
        init.ones_(self.D)
        D, N = self.A_log.shape
        init.copy_(self.A_log, torch.arange(1, N + 1, dtype=torch.float32).log().expand(D, N))
        dt = torch.empty(D).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        init.copy_(self.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))   # the inverse of softplus

    def forward(
        self,
        x: Tensor,
        rotary: None = None,
        keep: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.convolve(u, keep, past_key_values)
        dt, b, c = self.x_proj(u).split(self.sizes, dim=-1)
        dt = linear(dt, self.dt_proj.weight)
        return self.out_proj(self.scan(u, dt, b, c, z, keep, past_key_values))

    def convolve(self, u: Tensor, keep: Tensor | None, cache: Cache | None) -> Tensor:
        """silu(conv1d(u)) behind the cache's last inputs, which are replaced.  u [B, T, D]."""
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if keep is None and cache is None:
            return causal_conv1d(u, weight, bias, activation="silu")
        state = None if cache is None else cache.get_conv_state(self.layer_idx)
        if decodes(u, keep, state):
            return causal_conv1d_step(u[:, 0], weight, bias, state=state, activation="silu")[:, None]
        if keep is None:
            u, state = causal_conv1d(
                u, weight, bias, activation="silu", initial_state=state, return_final_state=True
            )
        else:
            u, state = masked_conv1d(u, weight, bias, keep, state)
        if cache is not None:
            cache.update_conv_state(state, self.layer_idx)
        return u

    def scan(
        self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, z: Tensor, keep: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """`selective_scan` from the cache's state on, which is advanced.  u, dt, z [B, T, D], b, c [B, T, N]."""
        full = torch.promote_types(u.dtype, torch.float32)
        a, d, bias = -self.A_log.to(full).exp(), self.D.to(full), self.dt_proj.bias.to(full)
        if keep is not None:
            dt = dt.masked_fill(~keep[..., None], NO_STEP)
        if cache is None:
            return selective_scan(u, dt, a, b, c, d, z=z, dt_bias=bias, dt_softplus=True)
        state = cache.get_recurrent_state(self.layer_idx)
        if decodes(u, keep, state):
            step = (x[:, 0] for x in (u, dt))
            y = selective_scan_step(
                *step, a, b[:, 0], c[:, 0], d, z=z[:, 0], dt_bias=bias, dt_softplus=True, state=state
            )[:, None]
        else:
            y, state = selective_scan(
                u, dt, a, b, c, d, z=z, dt_bias=bias, dt_softplus=True, initial_state=state, return_final_state=True
            )
        cache.update_recurrent_state(state, self.layer_idx, tokens=u.shape[1])
        return y


def masked_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(causal_conv1d) over the kept tokens alone, as if the others were not there.

    x [B, T, D], keep [B, T] bool.  Returns [B, T, D], meaningless where keep is False, and the state [B, D, W-1].
    """
    B, T, D = x.shape
    W = weight.shape[1]
    past = x.new_zeros(B, W - 1, D) if initial_state is None else initial_state.to(x.dtype).mT
    x = torch.cat((past, x), dim=1)
    kept = torch.cat((keep.new_ones(B, W - 1), keep), dim=1)
    # Skipped tokens first, then the past, then the kept tokens: each of these has its own W-1 predecessors before it.
    order = kept.int().argsort(dim=1, stable=True)[..., None].expand(-1, -1, D)
    y, state = causal_conv1d(x.gather(1, order), weight, bias, activation="silu", return_final_state=True)
    return torch.empty_like(y).scatter(1, order, y)[:, W - 1 :], state
