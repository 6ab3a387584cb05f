"""The selective state space mixer, Mamba-1 (Gu and Dao 2023, section 3.4)."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache

from lcikernels.layers.conv1d import CausalConv1d
from lcikernels.layers.state import decodes
from lcikernels.ops import selective_scan, selective_scan_step

DT_MIN, DT_MAX = 1e-3, 1e-1  # a fresh channel remembers about 1 / dt tokens: 10 to 1000
NO_STEP = -1e4  # softplus(NO_STEP) is exactly 0, and float16 holds it


def fresh_dt_bias(count: int) -> Tensor:
    """As published: softplus of it is log-uniform in [1e-3, 0.1].  float32 [count]."""
    dt = torch.empty(count, dtype=torch.float32).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


class StepProjection(nn.Linear):
    """x weight^T, and the bias, which is left to the scan: their sum in 16 bits would put dt off by 1.6 %."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, self.weight), self.bias


class Mamba(nn.Module):
    """out_proj(y), where y is the gated selective scan of D = expand * hidden_size channels:

        u, z = in_proj(x);  u = silu(conv1d(u));  dt, b, c = x_proj(u);  dt = softplus(dt_proj(dt))
        y = (selective_scan(u, dt, a = -exp(A_log), b, c) + D * u) * silu(z)

    x [B, T, hidden_size]; keep [B, T], where given, is False at tokens that leave no trace in the states
    (padding); cache, where given, is advanced by T tokens. rotary is not read: a scan has an order.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        D, N, R = config.expand * config.hidden_size, config.state_size, config.time_step_rank
        self.layer_idx, self.sizes = layer_idx, (R, N, N)
        self.in_proj = nn.Linear(config.hidden_size, 2 * D, bias=False)
        self.conv1d = CausalConv1d(D, config.conv_kernel, layer_idx)
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.dt_proj = StepProjection(R, D)
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, config.hidden_size, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As published: a = -1 .. -N, D = 1, dt log-uniform in [1e-3, 0.1], matrices in +-fan_in ** -0.5."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        init.zeros_(self.conv1d.bias)
        init.ones_(self.D)
        D, N = self.A_log.shape
        init.copy_(self.A_log, torch.arange(1, N + 1, dtype=torch.float32).log().expand(D, N))
        init.copy_(self.dt_proj.bias, fresh_dt_bias(D))

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        keep: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d(u, keep, cache)
        return self.out_proj(self.scan(u, z, keep, cache))

    def scan(self, u: Tensor, z: Tensor, keep: Tensor | None, cache: Cache | None) -> Tensor:
        """The gated scan from the cache's state on, which is advanced.  u, z and the result are [B, T, D]."""
        dt, b, c = self.x_proj(u).split(self.sizes, dim=-1)
        dt, bias = self.dt_proj(dt)
        if keep is not None:
            dt = dt.masked_fill(~keep[..., None], NO_STEP)
        a = -self.A_log.to(torch.promote_types(u.dtype, torch.float32)).exp()
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        if decodes(u, keep, state):
            u, dt, b, c, z = (y[:, 0] for y in (u, dt, b, c, z))
            y = selective_scan_step(u, dt, a, b, c, self.D, state=state, z=z, dt_bias=bias, dt_softplus=True)
            y = y[:, None]
        else:
            options = {"dt_softplus": True, "initial_state": state, "return_final_state": True}
            y, state = selective_scan(u, dt, a, b, c, self.D, z=z, dt_bias=bias, **options)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx, tokens=y.shape[1])
        return y
