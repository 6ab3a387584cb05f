"""The short convolution in front of a Mamba's recurrence."""

import torch
from torch import Tensor, nn

from lcikernels.ops import causal_conv1d, causal_conv1d_step


class CausalConv1d(nn.Module):
    """silu(causal_conv1d(x)), depthwise: weight [D, W], bias [D] or None; a weight [D, 1, W] loads into it.

    x [B, T, D], or one token [B, D] after those of `state`, which is changed in place. state [B, D, W-1] (or
    [N, D, W-1] of packed sequences): the inputs before x, zeros where it is None. keep bool [B, T], where
    given, is False at tokens that are left out as if they were not there, and whose result means nothing.
    Returns the result, like x, and the state after it.
    """

    def __init__(
        self,
        D: int,
        W: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D, W, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(D, device=device, dtype=dtype)) if bias else None
        self.register_load_state_dict_pre_hook(squeeze_weight)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self.weight, self.bias
        if x.dim() == 2:
            return causal_conv1d_step(x, weight, bias, state=state, activation="silu"), state
        if keep is not None:
            return masked_conv1d(x, weight, bias, keep, state)
        options = {"initial_state": state, "cu_seqlens": cu_seqlens, "return_final_state": True}
        return causal_conv1d(x, weight, bias, activation="silu", **options)


def squeeze_weight(module: nn.Module, weights: dict[str, Tensor], prefix: str, *_) -> None:
    """torch's Conv1d has the weight [D, 1, W]."""
    name = f"{prefix}weight"
    if name in weights and weights[name].dim() == 3:
        weights[name] = weights[name].squeeze(1)


def masked_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(causal_conv1d) over the kept tokens alone, as if the others were not there.

    x [B, T, D]; keep bool [B, T]; initial_state [B, D, W-1] or None.
    Returns [B, T, D], meaningless where keep is False, and the state [B, D, W-1].
    """
    B, _, D = x.shape
    W = weight.shape[1]
    past = x.new_zeros(B, W - 1, D) if initial_state is None else initial_state.mT.to(x.dtype)
    x = torch.cat((past, x), dim=1)
    kept = torch.cat((keep.new_ones(B, W - 1), keep), dim=1)
    # Skipped tokens first, then the past, then the kept tokens: each of those has its own W-1 predecessors.
    order = kept.int().argsort(dim=1, stable=True)[..., None].expand(-1, -1, D)
    y, state = causal_conv1d(x.gather(1, order), weight, bias, activation="silu", return_final_state=True)
    return torch.empty_like(y).scatter(1, order, y)[:, W - 1 :], state
