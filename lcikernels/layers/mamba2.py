"""The state space dual mixer, Mamba-2 (Dao and Gu 2024, section 7): one decay a head and token."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache

from lcikernels.layers.conv1d import CausalConv1d
from lcikernels.layers.mamba import fresh_dt_bias
from lcikernels.layers.retention import retain
from lcikernels.ops import gated_rms_norm


class GatedNorm(nn.Module):
    """rms_norm(y * silu(z)) * weight, with a norm of its own for each of G groups of channels.

    y, z [..., D]; weight [D].
    """

    def __init__(self, D: int, G: int, eps: float):
        super().__init__()
        self.groups, self.eps = G, eps
        self.weight = nn.Parameter(torch.empty(D))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, eps=self.eps, groups=self.groups, norm_before_gate=False)


class Mamba2(nn.Module):
    """out_proj(norm(y * silu(z))), where y is the retention of H heads, expand * hidden_size channels in all:

        z, u, dt = in_proj(x);  v, b, c = silu(conv1d(u));  dt = clamp(softplus(dt + dt_bias), *limit)
        S[t] = exp(-dt[t] exp(A_log)) S[t-1] + b[t] ⊗ dt[t] v[t];  y[t] = c[t] · S[t] + D v[t]

    A head has its own dt, A_log and D; a group of heads shares b, c [B, T, state_size] and one norm.

    x [B, T, hidden_size]; keep [B, T], where given, is False at tokens that leave no trace in the states
    (padding); cache, where given, is advanced by T tokens. rotary is not read: a scan has an order.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        D, H = config.expand * config.hidden_size, config.mamba2_num_heads
        G, N = config.mamba2_n_groups, config.mamba2_state_size
        self.layer_idx, self.num_heads, self.groups = layer_idx, H, G
        self.time_step_limit = config.time_step_limit
        self.projected, self.convolved = (D, D + 2 * G * N, H), (D, G * N, G * N)
        self.in_proj = nn.Linear(config.hidden_size, sum(self.projected), bias=False)
        self.conv1d = CausalConv1d(sum(self.convolved), config.conv_kernel, layer_idx)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = GatedNorm(D, G, config.layer_norm_eps)
        self.out_proj = nn.Linear(D, config.hidden_size, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As published: rates uniform in -1 .. -16, D = 1; dt and the matrices as Mamba's."""
        for module in (self.in_proj, self.conv1d, self.out_proj):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        init.zeros_(self.conv1d.bias)
        init.ones_(self.D)
        init.ones_(self.norm.weight)
        init.copy_(self.A_log, torch.empty(self.num_heads, dtype=torch.float32).uniform_(1, 16).log())
        init.copy_(self.dt_bias, fresh_dt_bias(self.num_heads))

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        keep: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        z, u, dt = self.in_proj(x).split(self.projected, dim=-1)
        u = self.conv1d(u, keep, cache)
        return self.out_proj(self.norm(self.scan(u, dt, keep, cache), z))

    def scan(self, u: Tensor, dt: Tensor, keep: Tensor | None, cache: Cache | None) -> Tensor:
        """y [B, T, D] from the cache's state on, which is advanced.  u holds v, b and c; dt [B, T, H]."""
        v, b, c = u.split(self.convolved, dim=-1)
        v = v.unflatten(-1, (self.num_heads, -1))
        b, c = (x.unflatten(-1, (self.groups, -1)) for x in (b, c))
        exact = torch.promote_types(u.dtype, torch.float32)  # a decay in bfloat16 would be off by 0.4 %
        dt = softplus(dt.to(exact) + self.dt_bias).clamp(*self.time_step_limit)
        log_decay = -self.A_log.to(exact).exp() * dt
        written = (v * dt[..., None]).to(v.dtype)
        y = retain(c, b, written, log_decay, keep, cache, self.layer_idx, scale=1.0)
        return torch.addcmul(y, v, self.D.to(v.dtype)[:, None]).flatten(-2)
