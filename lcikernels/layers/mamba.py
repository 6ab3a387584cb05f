"""The selective state space mixer, Mamba-1 (Gu and Dao 2023, section 3.4)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lcikernels.layers.conv1d import CausalConv1d
from lcikernels.layers.layer import (
    KeepsFloat32,
    Layer,
    State,
    at_least_float32,
    check_input,
    place_of_state,
    uniform,
    zero_biases,
)
from lcikernels.ops import checks, selective_scan, selective_scan_step

NO_STEP = -1e4  # softplus(NO_STEP) is exactly 0, and float16 holds it


def fresh_dt_bias(bias: Tensor) -> Tensor:
    """As published: softplus of it is log-uniform in [1e-3, 0.1], a memory of 10 to 1000 tokens.

    float32, of the shape and on the device of `bias`.
    """
    dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


class StepProjection(KeepsFloat32, nn.Linear):
    """x weight^T, and the bias, which is left to the scan: their sum in 16 bits would put dt off by 1.6 %."""

    in_float32 = ("bias",)

    def __init__(
        self,
        R: int,
        D: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(R, D, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(D, device=device, dtype=at_least_float32(dtype)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, self.weight), self.bias


class Mamba(Layer):
    """out_proj(y), where y is the gated selective scan of D = expand * hidden_size channels:

        u, z = in_proj(x);  u = silu(conv1d(u));  dt, b, c = x_proj(u);  dt = softplus(dt_proj(dt))
        y = (selective_scan(u, dt, a = -exp(A_log), b, c) + D * u) * silu(z)

    state_size N states a channel; conv_kernel W; time_step_rank R of dt, "auto" is ceil(hidden_size / 16).
    bias: of in_proj and out_proj; conv_bias: of the convolution. A_log and dt_proj.bias stay in float32 where
    the layer is turned into 16 bits. The tensors have the names of mamba_ssm's Mamba and of transformers'
    MambaMixer, whose state dicts load; only conv1d.weight is [D, W] here.

    forward(x [B, T, hidden_size]) gives y like x, and with return_state (y, state), the state after x. Given
    a state x counts on from it, and it stays as it is. cu_seqlens [N+1], integers, B = 1: x holds N sequences
    one after another, n at tokens cu_seqlens[n] to cu_seqlens[n+1], and states are those of N rows.
    keep bool [B, T] is False at tokens that leave no trace (padding), whose y means nothing.

    A state is State(recurrent [B, D, N], conv [B, D, W-1]), float32, or float64 in a layer of that.
    Raises ValueError where a size, shape or dtype does not fit.
    """

    in_float32 = ("A_log",)

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: float = 2,
        time_step_rank: int | str = "auto",
        bias: bool = False,
        conv_bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        R = -(-hidden_size // 16) if time_step_rank == "auto" else time_step_rank
        D, N, W = round(expand * hidden_size), state_size, conv_kernel
        sizes = {"hidden_size": hidden_size, "state_size": N, "conv_kernel": W, "expand": D}
        checks.positive("Mamba", **sizes, time_step_rank=R)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        exact: dict[str, Any] = {"device": device, "dtype": at_least_float32(dtype)}
        self.hidden_size, self.sizes = hidden_size, (R, N, N)
        self.in_proj = nn.Linear(hidden_size, 2 * D, bias=bias, **place)
        self.conv1d = CausalConv1d(D, W, bias=conv_bias, **place)
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False, **place)
        self.dt_proj = StepProjection(R, D, **place)
        self.A_log = nn.Parameter(torch.empty(D, N, **exact))
        self.D = nn.Parameter(torch.empty(D, **place))
        self.out_proj = nn.Linear(D, hidden_size, bias=bias, **place)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, layer_idx: int) -> "Mamba":
        """The layer of an LCIConfig's model; all are alike, whatever their number."""
        return cls(
            config.hidden_size,
            config.state_size,
            config.conv_kernel,
            config.expand,
            config.time_step_rank,
        )

    def initial_values(self) -> dict[str, Tensor]:
        """As published: a = -1 .. -N, D = 1, dt log-uniform in [1e-3, 0.1], matrices in +-fan_in ** -0.5."""
        matrices = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
        values = {f"{name}.weight": uniform(getattr(self, name).weight) for name in matrices}
        return values | {
            **zero_biases(self),
            "D": torch.ones_like(self.D),
            "A_log": torch.ones_like(self.A_log).cumsum(1).log(),
            "dt_proj.bias": fresh_dt_bias(self.dt_proj.bias),
        }

    def allocate_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token of `batch_size` rows: zeros."""
        (D, N), W = self.A_log.shape, self.conv1d.weight.shape[1]
        place = place_of_state(self.D, device, dtype)
        return State(torch.zeros(batch_size, D, N, **place), torch.zeros(batch_size, D, W - 1, **place))

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
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.conv1d(u, conv, cu_seqlens, keep)
        y, recurrent = self.scan(u, z, recurrent, cu_seqlens, keep)
        y = self.out_proj(y)
        return (y, State(recurrent, conv)) if return_state else y

    def scan(
        self, u: Tensor, z: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gated scan of u, z [B, T, D] from `state` on, and the state after it."""
        dt, b, c = self.x_proj(u).split(self.sizes, dim=-1)
        dt, bias = self.dt_proj(dt)
        if keep is not None:
            dt = dt.masked_fill(~keep[..., None], NO_STEP)
        a = -self.A_log.to(torch.promote_types(u.dtype, torch.float32)).exp()
        gates = {"z": z, "dt_bias": bias, "dt_softplus": True}
        if u.dim() == 2:
            return selective_scan_step(u, dt, a, b, c, self.D, state=state, **gates), state
        options = {"initial_state": state, "cu_seqlens": cu_seqlens, "return_final_state": True}
        return selective_scan(u, dt, a, b, c, self.D, **gates, **options)
