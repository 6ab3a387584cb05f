"""Multi-scale retention (Sun et al. 2023, section 2.2), with rotary positions in the place of xPos."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcikernels.layers.layer import (
    Layer,
    State,
    at_least_float32,
    check_input,
    check_step,
    place_of_state,
    xavier,
    zero_biases,
)
from lcikernels.layers.norm import GatedNorm, RMSNorm
from lcikernels.layers.rotary import positions_of, rotary_angles, rotate
from lcikernels.ops import checks, retention, retention_step


def retnet_log_decay(H: int, device: torch.device | None = None) -> Tensor:
    """log(1 - 2^(-5-h)) for h = 0 .. H-1, float32 [H].  Sun et al. 2023, section 3.1."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(H, dtype=torch.float32, device=device)))


def log_decays(H: int, listed: Sequence[float] | None, device: torch.device | None = None) -> Tensor:
    """One for each of H heads, float32 [H]: as listed, or RetNet's where that is None."""
    if listed is None:
        return retnet_log_decay(H, device)
    return torch.tensor(listed, dtype=torch.float32, device=device)


class Retention(Layer):
    """o_proj(rms_norm_per_head(o) * silu(g_proj(x))), where o is the retention of H heads:

        q, k, v = q_proj(x), k_proj(x), v_proj(x), with q and k normed, if at all, and rotated
        S[t] = exp(log_decay) S[t-1] + k[t] ⊗ v[t];  o[t] = K ** -0.5 q[t] · S[t]

    K = expand_k * hidden_size / num_heads, V = expand_v * hidden_size / num_heads. num_kv_heads (None:
    num_heads) heads of k and v are shared evenly. log_decay: a number <= 0 for each head, float32 whatever
    the layer is turned into; None is RetNet's, log(1 - 2^(-5-h)). With learned_decay, which starts from
    numbers < 0, it is -exp(A_log), A_log [H] a parameter that stays in float32 where the layer is turned into
    16 bits. rotary_dims (None: K) dims of a head rotate, pair i by rope_theta ** (-2i / rotary_dims) a token;
    0: none, and there are no positions but the order. qk_norm: an RMSNorm of each "head" of q and k, or of
    "all" heads as one, whose gains are stored less one with zero_centered_norms. norm_eps is the eps of all
    norms; norm_weight: a gain for each of V channels; bias: of the projections, out_bias (None: bias) of
    o_proj. The state dict of fla's MultiScaleRetention loads.

    forward(x [B, T, hidden_size]) gives y like x, and with return_state (y, state), the state after x. Given
    a state x counts on from it, and it stays as it is. cu_seqlens [N+1], integers, B = 1: x holds N sequences
    one after another, n at tokens cu_seqlens[n] to cu_seqlens[n+1], and states are those of N rows.
    keep bool [B, T] is False at tokens that leave no trace (padding), whose y means nothing.
    rotary: cos and sin of `rotary_angles`, where positions are the caller's, not the layer's own; the state
    then has none.

    A state is State(recurrent [B, H, K, V] float32, or float64 in a layer of that; position [B] int64, None
    where nothing rotates).
    Raises ValueError where a size, shape or dtype does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        expand_k: float = 1,
        expand_v: float = 2,
        log_decay: Sequence[float] | None = None,
        learned_decay: bool = False,
        rotary_dims: int | None = None,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        norm_weight: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: str | None = None,
        zero_centered_norms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        H, Hk = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        keys, values = round(expand_k * hidden_size), round(expand_v * hidden_size)
        sizes = {"hidden_size": hidden_size, "num_heads": H, "num_kv_heads": Hk}
        checks.positive("Retention", **sizes, expand_k=keys, expand_v=values)
        if keys % H or values % H:
            expected = f"a divisor of expand_k * hidden_size={keys} and expand_v * hidden_size={values}"
            checks.refuse("Retention", "num_heads", expected, H)
        if H % Hk:
            checks.refuse("Retention", "num_kv_heads", f"a divisor of num_heads={H}", Hk)
        K, V = keys // H, values // H
        P = K if rotary_dims is None else rotary_dims
        if not 0 <= P + P % 2 <= K:
            checks.refuse("Retention", "rotary_dims", f"such that pairs fit the {K} dims of a head", P)
        if log_decay is not None:
            log_decay = tuple(map(float, log_decay))
            if len(log_decay) != H or not all(x <= 0 for x in log_decay):
                checks.refuse("Retention", "log_decay", f"num_heads={H} numbers, each <= 0", log_decay)
            if learned_decay and not all(x < 0 for x in log_decay):
                checks.refuse("Retention", "log_decay", "below 0 in every head with learned_decay", log_decay)
        checks.one_of("Retention", "qk_norm", qk_norm, (None, "head", "all"))
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, H, Hk
        self.rotary_dims, self.rope_theta, self.decays = P, rope_theta, log_decay
        self.q_proj = nn.Linear(hidden_size, keys, bias=bias, **place)
        self.k_proj = nn.Linear(hidden_size, Hk * K, bias=bias, **place)
        self.v_proj = nn.Linear(hidden_size, Hk * V, bias=bias, **place)
        self.g_proj = nn.Linear(hidden_size, values, bias=bias, **place)
        self.norm = GatedNorm(V, norm_eps, weight=norm_weight, **place)
        self.o_proj = nn.Linear(values, hidden_size, bias=bias if out_bias is None else out_bias, **place)
        if qk_norm is not None:
            options = place | {"zero_centered": zero_centered_norms}
            self.q_norm = RMSNorm(K if qk_norm == "head" else keys, norm_eps, **options)
            self.k_norm = RMSNorm(K if qk_norm == "head" else Hk * K, norm_eps, **options)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        if learned_decay:
            self.in_float32 = ("A_log",)
            self.A_log = nn.Parameter(torch.empty(H, device=device, dtype=at_least_float32(dtype)))
        else:
            self.register_buffer("fixed_decay", log_decays(H, log_decay, device), persistent=False)
        self.register_load_state_dict_pre_hook(rename_norm)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, layer_idx: int) -> "Retention":
        """The layer of that number in an LCIConfig's model.

        Its own positions are of the default kind: those of another are the model's to give, as `rotary`.
        """
        width = config.retention_num_heads * config.head_sizes["R"]
        return cls(
            config.hidden_size,
            config.retention_num_heads,
            num_kv_heads=config.retention_num_kv_heads,
            expand_k=width / config.hidden_size,
            expand_v=width / config.hidden_size,
            log_decay=config.retention_log_decay,
            learned_decay=config.retention_learned_decay,
            rotary_dims=config.rotary_dims["R"] if config.rotates(layer_idx) else 0,
            rope_theta=config.rope_of("R").get("rope_theta", 10000.0),
            norm_eps=config.norm_eps,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            qk_norm=config.qk_norm,
            zero_centered_norms=config.zero_centered_norms,
        )

    @property
    def log_decay(self) -> Tensor:
        """Of every head, <= 0: [H], float32, or float64 where learned in a layer of that."""
        return -self.A_log.exp() if self.in_float32 else self.fixed_decay

    def _apply(self, fn, recurse: bool = True):
        # The buffer follows devices, not dtypes: bfloat16 would put the rates off by up to 0.4 %.
        super()._apply(fn, recurse)
        if not self.in_float32:
            self.fixed_decay = log_decays(self.num_heads, self.decays, self.fixed_decay.device)
        return self

    def initial_values(self) -> dict[str, Tensor]:
        """As published: Xavier's matrices, by 2 ** -2.5 and in o_proj by 1/2, no biases, gains of 1."""
        gains = {**dict.fromkeys("qkvg", 2**-2.5), "o": 0.5}
        weights = {name: getattr(self, f"{name}_proj").weight for name in gains}
        values = {f"{name}_proj.weight": xavier(weights[name], gain) for name, gain in gains.items()}
        if self.norm.weight is not None:
            values["norm.weight"] = torch.ones_like(self.norm.weight)
        for name in ("q_norm", "k_norm"):
            if isinstance(norm := getattr(self, name), RMSNorm):
                values[f"{name}.weight"] = norm.initial_value()
        if self.in_float32:
            values["A_log"] = self.initial_A_log()
        return values | zero_biases(self)

    def initial_A_log(self) -> Tensor:
        """What learned decays start from, [H]."""
        decays = log_decays(self.num_heads, self.decays, torch.device("cpu"))
        return by_head(self.A_log, decays.neg().log().tolist())

    def allocate_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token of `batch_size` rows: zeros."""
        weight, H = self.o_proj.weight, self.num_heads
        K, V = self.q_proj.weight.shape[0] // H, weight.shape[1] // H
        place = place_of_state(weight, device, dtype)
        position = None
        if self.rotary_dims:
            position = torch.zeros(batch_size, device=place["device"], dtype=torch.int64)
        return State(torch.zeros(batch_size, H, K, V, **place), position=position)

    def step(self, x: Tensor, state: State, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The output at one token, x [B, hidden_size], after those of `state`, which is changed in place.

        rotary as forward's, of T = 1. Returns [B, hidden_size]. For decoding, under torch.no_grad(): it has
        no gradient.
        """
        check_step(self, x, state)
        return self(x, state, rotary=rotary)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        check_input(self, x, state, cu_seqlens, keep)
        recurrent, position = (None, None) if state is None else (state.recurrent, state.position)
        q, g = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.g_proj))
        k, v = (proj(x).unflatten(-1, (self.num_kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        one, counts = x.dim() == 2, rotary is None and self.rotary_dims > 0
        if counts:
            if state is not None and position is None:
                expected = "given, as it was where the state comes from (that state has no positions)"
                checks.refuse("Retention", "rotary", expected, "None")
            if one:
                places = position[:, None]
            else:
                places, position = positions_of(*x.shape[:2], position, cu_seqlens, keep, x.device)
            exact = torch.promote_types(q.dtype, torch.float32)
            rotary = rotary_angles(places, self.rotary_dims, self.rope_theta, exact)
        if rotary is not None:
            cos, sin = (angle[:, 0] for angle in rotary) if one else rotary
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        log_decay = self.log_decay.to(torch.promote_types(q.dtype, torch.float32))
        o, recurrent = retain(q, k, v, log_decay, recurrent, cu_seqlens, keep)
        if one and counts:
            position.add_(1)
        y = self.o_proj(self.norm(o, g).flatten(-2))
        return (y, State(recurrent, position=position)) if return_state else y


def by_head(like: Tensor, numbers: Sequence[float]) -> Tensor:
    """The numbers, as a tensor like [H]; by its own index, so that it may be one that processes share."""
    head, out = torch.ones_like(like).cumsum(0), torch.zeros_like(like)
    for h, number in enumerate(numbers, 1):
        out = torch.where(head == h, number, out)
    return out


def rename_norm(module: nn.Module, weights: dict[str, Tensor], prefix: str, *_) -> None:
    """fla's names for the gain of the norm, with its gate fused and without."""
    for name in ("g_norm_swish_gate", "g_norm"):
        if (weight := weights.pop(f"{prefix}{name}.weight", None)) is not None:
            weights[f"{prefix}norm.weight"] = weight


def retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: Tensor | None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`retention` of the kept tokens from `state` on, and the state after it; without T, `retention_step`."""
    if q.dim() == 3:
        return retention_step(q, k, v, log_decay, state=state, scale=scale), state
    if keep is not None:  # padding adds nothing and fades nothing
        k = k * keep[..., None, None]
        log_decay = torch.where(keep[..., None], log_decay, 0.0)
    options = {"scale": scale, "initial_state": state, "cu_seqlens": cu_seqlens}
    return retention(q, k, v, log_decay, **options, return_final_state=True)
