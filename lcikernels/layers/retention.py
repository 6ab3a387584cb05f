"""Multi-scale retention (Sun et al. 2023, section 2.2), with rotary positions in the place of xPos."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from lcikernels.layers.rotary import rotate
from lcikernels.layers.state import decodes
from lcikernels.ops import gated_rms_norm, retention, retention_step


def retnet_log_decay(H: int, device: torch.device | None = None) -> Tensor:
    """log(1 - 2^(-5-h)) for h = 0 .. H-1, float32 [H].  Sun et al. 2023, section 3.1."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(H, dtype=torch.float32, device=device)))


def log_decays(config: PreTrainedConfig, device: torch.device | None = None) -> Tensor:
    """One for each retention head of a model, float32 [H]: as listed in retention_log_decay, or RetNet's."""
    if config.retention_log_decay is None:
        return retnet_log_decay(config.retention_num_heads, device)
    return torch.tensor(config.retention_log_decay, dtype=torch.float32, device=device)


class Retention(nn.Module):
    """o_proj(rms_norm_per_head(retention(q, k, v)) * silu(g_proj(x))), with q and k rotated.

    x [B, T, hidden_size]; rotary from `rotary_angles`; keep [B, T], where given, is False at tokens that
    leave no trace in the state (padding); cache, where given, is advanced by T tokens. Each head
    has its own fixed decay, exp of the config's retention_log_decay (None: RetNet's, by the head's number);
    the norm has no weight.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.eps = config, layer_idx, config.layer_norm_eps
        self.num_heads = config.retention_num_heads
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, size, bias=bias)
        self.v_proj = nn.Linear(size, size, bias=bias)
        self.g_proj = nn.Linear(size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=bias)
        self.register_buffer("log_decay", log_decays(config), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        # The buffer follows devices, not dtypes: bfloat16 would put the rates off by up to 0.4 %.
        super()._apply(fn, recurse)
        self.log_decay = log_decays(self.config, self.log_decay.device)
        return self

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        keep: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        q, k, v, g = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in projections)
        log_decay = self.log_decay.to(torch.promote_types(x.dtype, torch.float32))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        o = retain(q, k, v, log_decay, keep, cache, self.layer_idx)
        return self.o_proj(gated_rms_norm(o, g, eps=self.eps).flatten(2))


def retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    keep: Tensor | None,
    cache: Cache | None,
    layer_idx: int,
    scale: float | None = None,
) -> Tensor:
    """`retention` from the cache's state on, which is advanced by the kept tokens."""
    if keep is not None:
        k = k * keep[..., None, None]
        log_decay = log_decay * keep[..., None]  # [B, T, H]: padding adds nothing and fades nothing
    state = None if cache is None else cache.get_recurrent_state(layer_idx)
    if decodes(q, keep, state):
        log_decay = log_decay if log_decay.dim() == 1 else log_decay[:, 0]
        o = retention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state=state, scale=scale)[:, None]
    else:
        options = {"scale": scale, "initial_state": state, "return_final_state": True}
        o, state = retention(q, k, v, log_decay, **options)
    if cache is not None:
        cache.update_recurrent_state(state, layer_idx, tokens=q.shape[1])
    return o
