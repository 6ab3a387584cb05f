"""The state space dual mixer, Mamba-2 (Dao and Gu 2024, section 7): one decay a head and token."""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lcikernels.layers.conv1d import CausalConv1d
from lcikernels.layers.layer import (
    Layer,
    State,
    at_least_float32,
    check_input,
    place_of_state,
    uniform,
    zero_biases,
)
from lcikernels.layers.mamba import fresh_dt_bias
from lcikernels.layers.norm import GatedNorm
from lcikernels.layers.retention import retain
from lcikernels.ops import checks


class Mamba2(Layer):
    """out_proj(norm(y * silu(z))), where y is the retention of H heads of P = head_dim channels, D in all:

        z, u, dt = in_proj(x);  v, b, c = silu(conv1d(u));  dt = clamp(softplus(dt + dt_bias), *limit)
        S[t] = exp(-dt[t] exp(A_log)) S[t-1] + b[t] ⊗ dt[t] v[t];  y[t] = c[t] · S[t] + D v[t]

    D = expand * hidden_size; H is D / head_dim, and head_dim is 64, or D / H where num_heads H is given. A
    head has its own dt, A_log and D; each of num_groups groups of heads shares b, c [B, T, state_size] and
    one norm, of eps norm_eps. conv_kernel W, over v, b and c together; time_step_limit bounds dt. bias: of
    in_proj and out_proj; conv_bias: of the convolution. A_log and dt_bias stay in float32 where the layer is
    turned into 16 bits. The tensors have the names of mamba_ssm's Mamba2 and of transformers' Mamba2Mixer,
    whose state dicts load; only conv1d.weight is [D + 2 G N, W] here.

    forward(x [B, T, hidden_size]) gives y like x, and with return_state (y, state), the state after x. Given
    a state x counts on from it, and it stays as it is. cu_seqlens [N+1], integers, B = 1: x holds N sequences
    one after another, n at tokens cu_seqlens[n] to cu_seqlens[n+1], and states are those of N rows.
    keep bool [B, T] is False at tokens that leave no trace (padding), whose y means nothing.

    A state is State(recurrent [B, H, state_size, P], conv [B, D + 2 G state_size, W-1]), float32, or float64
    in a layer of that. Raises ValueError where a size, shape or dtype does not fit.
    """

    in_float32 = ("A_log", "dt_bias")

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 128,
        conv_kernel: int = 4,
        expand: float = 2,
        head_dim: int | None = None,
        num_heads: int | None = None,
        num_groups: int = 1,
        time_step_limit: tuple[float, float] = (0.0, inf),
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        D, N, G, W = round(expand * hidden_size), state_size, num_groups, conv_kernel
        sizes = {"hidden_size": hidden_size, "state_size": N, "conv_kernel": W, "expand": D, "num_groups": G}
        checks.positive("Mamba2", **sizes)
        if head_dim is None and num_heads is None:
            head_dim = 64
        for name, part in (("head_dim", head_dim), ("num_heads", num_heads)):
            if part is not None and (part < 1 or D % part):
                checks.refuse("Mamba2", name, f"a divisor of expand * hidden_size={D}", part)
        H = D // head_dim if num_heads is None else num_heads
        if head_dim not in (None, D // H):
            expected = f"{D // H} where num_heads={H} share expand * hidden_size={D}"
            checks.refuse("Mamba2", "head_dim", expected, head_dim)
        if H % G:
            checks.refuse("Mamba2", "num_groups", f"a divisor of num_heads={H}", G)
        least, most = time_step_limit
        if not 0 <= least <= most:
            expected = "(least, most) with 0 <= least <= most"
            checks.refuse("Mamba2", "time_step_limit", expected, time_step_limit)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        exact: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        self.hidden_size, self.num_heads, self.groups = hidden_size, H, G
        self.time_step_limit = (least, most)
        self.projected, self.convolved = (D, D + 2 * G * N, H), (D, G * N, G * N)
        self.in_proj = nn.Linear(hidden_size, sum(self.projected), bias=bias, **place)
        self.conv1d = CausalConv1d(sum(self.convolved), W, bias=conv_bias, **place)
        self.dt_bias = nn.Parameter(torch.empty(H, **exact))
        self.A_log = nn.Parameter(torch.empty(H, **exact))
        self.D = nn.Parameter(torch.empty(H, **place))
        self.norm = GatedNorm(D, norm_eps, groups=G, norm_before_gate=False, **place)
        self.out_proj = nn.Linear(D, hidden_size, bias=bias, **place)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, layer_idx: int) -> "Mamba2":
        """The layer of an LCIConfig's model; all are alike, whatever their number."""
        return cls(
            config.hidden_size,
            config.mamba2_state_size,
            config.conv_kernel,
            config.expand,
            num_heads=config.mamba2_num_heads,
            num_groups=config.mamba2_n_groups,
            time_step_limit=config.time_step_limit,
            norm_eps=config.norm_eps,
        )

    def initial_values(self) -> dict[str, Tensor]:
        """As published: rates uniform in -1 .. -16, D = 1; dt and the matrices as Mamba's."""
        matrices = ("in_proj", "conv1d", "out_proj")
        values = {f"{name}.weight": uniform(getattr(self, name).weight) for name in matrices}
        return values | {
            **zero_biases(self),
            "D": torch.ones_like(self.D),
            "norm.weight": torch.ones_like(self.norm.weight),
            "A_log": torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log(),
            "dt_bias": fresh_dt_bias(self.dt_bias),
        }

    def allocate_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token of `batch_size` rows: zeros."""
        (D, GN, _), W, H = self.convolved, self.conv1d.weight.shape[1], self.num_heads
        place = place_of_state(self.D, device, dtype)
        recurrent = torch.zeros(batch_size, H, GN // self.groups, D // H, **place)
        return State(recurrent, torch.zeros(batch_size, D + 2 * GN, W - 1, **place))

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
        recurrent, conv = (None, None) if state is None else (state.recurrent, state.conv)
        z, u, dt = self.in_proj(x).split(self.projected, dim=-1)
        u, conv = self.conv1d(u, conv, cu_seqlens, keep)
        y, recurrent = self.scan(u, dt, recurrent, cu_seqlens, keep)
        y = self.out_proj(self.norm(y, z))
        return (y, State(recurrent, conv)) if return_state else y

    def scan(
        self, u: Tensor, dt: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y [B, T, D] from `state` on, and the state after it.  u holds v, b and c; dt [B, T, H]."""
        v, b, c = u.split(self.convolved, dim=-1)
        v = v.unflatten(-1, (self.num_heads, -1))
        b, c = (x.unflatten(-1, (self.groups, -1)) for x in (b, c))
        exact = torch.promote_types(u.dtype, torch.float32)  # a decay in bfloat16 would be off by 0.4 %
        dt = softplus(dt.to(exact) + self.dt_bias).clamp(*self.time_step_limit)
        log_decay = -self.A_log.to(exact).exp() * dt
        written = (v * dt[..., None]).to(v.dtype)
        y, state = retain(c, b, written, log_decay, state, cu_seqlens, keep, scale=1.0)
        return torch.addcmul(y, v, self.D.to(v.dtype)[:, None]).flatten(-2), state
