"""How a mixer starts from the attention whose place it takes: one function for each way.

    start         retention                        Mamba-2                          Mamba
    "published"   as its paper draws it            as its paper draws it            as its paper draws it
    "attention"   Q, K, V, O, heads regrouped      Q -> C, K -> B, V -> x, O        none is known

`Ridge` then solves for the output projection that fits best, whatever the start; it needs inputs. The modules
are those of one layer: an LCI model's Attention, with the source's weights, and its successor, as published.
Measured (3 layers of 64, 128 tokens): retention starts best from attention; Mamba-2 aligns closer from it for
the same operations, but then trains worse than from its published start.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from growth.errors import refuse
from lcikernels.layers import Mamba2, Retention
from lcikernels.models import LCIConfig
from lcikernels.models.attention import Attention

RIDGE = 1e-3  # of the mean square of a feature


class Rows(NamedTuple):
    """Which rows of the source's projections become the rows of the new ones: q [H K], k and v [Hk K]."""

    q: Tensor
    k: Tensor
    v: Tensor


def regrouped(H: int, Hk: int, K: int, pairs: int, heads: int, new_pairs: int) -> Rows:
    """The rows by which H heads of K dims, which share Hk heads of k and v, become `heads` as wide together.

    pairs: how many pairs of dims (i, i + pairs) of a head rotate; new_pairs: of a new one. As many heads stay
    as they are, shared or not. Of others each has its own k and v, repeated for every head that reads them.
    Where r neighbours become one, pair i of the m-th is pair r i + m of the new head: its rate theta **
    (-(r i + m) / (r pairs)) is the old one for m = 0, and the next slower ones for the others; what does not
    rotate lies behind. Where a head becomes r, the m-th takes the pairs m, m + r, .. and its share of what
    does not rotate. Values keep their order, and so do the columns of o.
    Raises Refusal where neither number of heads is a multiple of the other, or the pairs do not fit.
    """
    if heads == H:
        own = torch.arange(Hk * K)
        return Rows(torch.arange(H * K), own, own)
    if H % heads and (heads % H or K % (heads // H)):
        expected = f"a divisor of the source's {H} heads, or a multiple that divides its {H * K} dims evenly"
        raise refuse("retention-heads", expected, heads, "choose one, or start published")
    if heads < H:
        r = H // heads
        order = [laid(*merged(range(h * r, (h + 1) * r), K, pairs), new_pairs) for h in range(heads)]
    else:
        r = heads // H
        order = [laid(*split(h // r, h % r, r, K, pairs), new_pairs) for h in range(heads)]
    q, v = torch.tensor(order).flatten(), torch.arange(H * K)
    k, v = (rows // K // (H // Hk) * K + rows % K for rows in (q, v))
    return Rows(q, k, v)


Turning = list[tuple[int, int]]  # dims that rotate together


def merged(heads: Iterable[int], K: int, pairs: int) -> tuple[Turning, list[int]]:
    """The pairs that rotate of several heads, the fastest first, and the dims that do not."""
    heads = [*heads]
    turning = [(h * K + i, h * K + i + pairs) for i in range(pairs) for h in heads]
    return turning, [h * K + i for h in heads for i in range(2 * pairs, K)]


def split(head: int, part: int, parts: int, K: int, pairs: int) -> tuple[Turning, list[int]]:
    """The pairs that rotate of one of the parts of a head, and the dims that do not."""
    (turning, rest), taken = merged([head], K, pairs), [-(-(pairs - m) // parts) for m in range(parts)]
    room = [K // parts - 2 * count for count in taken]
    if min(room) < 0 or sum(room) != len(rest):
        expected = f"parts of a head whose {pairs} pairs of rotating dims fit its {K // parts} dims"
        raise refuse("retention-heads", expected, f"{parts} parts of {K} dims", "choose fewer")
    start = sum(room[:part])
    return turning[part::parts], rest[start : start + room[part]]


def laid(turning: Turning, rest: list[int], pairs: int) -> list[int]:
    """The dims of a head of which `pairs` pairs rotate: first halves, second halves, the others."""
    spare = [dim for pair in turning[pairs:] for dim in pair] + rest
    lack = max(0, pairs - len(turning))
    halves = [*turning[:pairs], *zip(spare[:lack], spare[lack : 2 * lack])]
    return [a for a, _ in halves] + [b for _, b in halves] + spare[2 * lack :]


@torch.no_grad()
def retention_from_attention(mixer: Retention, attention: Attention, pairs: tuple[int, int]) -> None:
    """Q, K, V, O of the attention, in as many heads as the retention has.

        o[t] = sum_s exp(log_decay (t - s)) (q[t] . k[s]) v[s]   in the place of   softmax(q[t] . k[s]) v[s]

    q_proj, k_proj, v_proj are rows of the attention's, as `regrouped` has them; o_proj [hidden_size, H K] is
    the attention's; gains of q and k follow their dims. The gate g stays as it was drawn: opened to 1 it
    trained no better. The attention's scale is left out: the norm of each head divides it out again.
    pairs: that rotate, of a head of the attention and of the retention. One head of several adds up their
    scores, and its q/k norms are over all their dims. Sun et al. 2023, section 2; XATL's mode "all".
    """
    K = attention.head_dim
    H, Hk = (proj.out_features // K for proj in (attention.q_proj, attention.k_proj))
    rows = regrouped(H, Hk, K, pairs[0], mixer.num_heads, pairs[1])
    for name, index in zip("qkv", rows):
        take(getattr(mixer, f"{name}_proj"), getattr(attention, f"{name}_proj"), index)
    take(mixer.o_proj, attention.o_proj)
    for name, index in (("q_norm", rows.q), ("k_norm", rows.k)):
        if (gain := getattr(getattr(attention, name), "weight", None)) is not None:
            own = getattr(mixer, name).weight
            own.copy_(gain[index % K][: len(own)] if len(gain) == K else gain[index])


@torch.no_grad()
def mamba2_from_attention(mixer: Mamba2, attention: Attention) -> None:
    """Q -> C, K -> B, V -> x, O -> out_proj; the convolution passes each token on; the rest as published.

        S[t] = exp(-dt[t] a) S[t-1] + k[t] ⊗ dt[t] v[t];   y[t] = q[t] . S[t] + D v[t]

    with k, v repeated for the heads that share them, and silu over q, k and v. The mixer has a group and a
    head for each of the attention's H heads, K states and K channels in each (`mamba2_fields`). Biases become
    the convolution's. Rotary positions, the scale and q/k norms have no place in it.
    Wang et al. 2024 (arXiv 2408.15237), section 3.
    """
    K = attention.head_dim
    H, Hk = (proj.out_features // K for proj in (attention.q_proj, attention.k_proj))
    assert (mixer.num_heads, mixer.groups, mixer.convolved) == (H, H, (H * K, H * K, H * K))
    own = torch.arange(H * K)
    repeated = own // K // (H // Hk) * K + own % K
    sources = ((attention.v_proj, repeated), (attention.k_proj, repeated), (attention.q_proj, own))
    _, u, _ = mixer.in_proj.weight.split(mixer.projected)
    u.copy_(torch.cat([proj.weight[rows] for proj, rows in sources]))
    mixer.conv1d.weight.zero_()[:, -1] = 1.0
    mixer.conv1d.bias.zero_()
    if attention.q_proj.bias is not None:
        mixer.conv1d.bias.copy_(torch.cat([proj.bias[rows] for proj, rows in sources]))
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    if mixer.out_proj.bias is not None and attention.o_proj.bias is not None:
        mixer.out_proj.bias.copy_(attention.o_proj.bias)


def mamba2_fields(config: LCIConfig) -> dict[str, float]:
    """The fields of a Mamba-2 that can start by `mamba2_from_attention`."""
    H, K = config.num_attention_heads, config.head_dim
    expand = H * K / config.hidden_size
    return {"expand": expand, "mamba2_num_heads": H, "mamba2_n_groups": H, "mamba2_state_size": K}


def take(to: nn.Linear, of: nn.Linear, rows: Tensor | None = None) -> None:
    """Those rows of one projection, or all, become another's; a bias that only one has is left out, or 0."""
    to.weight.copy_(of.weight if rows is None else of.weight[rows])
    if to.bias is not None:
        bias = to.bias.new_zeros(()) if of.bias is None else of.bias
        to.bias.copy_(bias if rows is None or of.bias is None else bias[rows])


class Ridge:
    """Least squares with a penalty, over batches of which none is kept:

        W, b = argmin sum_n |W y[n] + b - o[n]|^2 + lambda |W|^2,   (Yc^T Yc + lambda I) W^T = Yc^T Oc

    where Yc and Oc are less their means if there is a b, which is not penalised. lambda is `strength` of the
    mean square of a feature, trace(Yc^T Yc) / d. Sums are float64, the solution is by Cholesky.
    """

    def __init__(self, features: int, outputs: int, bias: bool, strength: float = RIDGE):
        self.bias, self.strength, self.count = bias, strength, 0
        self.gram = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.moment = torch.zeros(features + 1, outputs, dtype=torch.float64)

    def add(self, y: Tensor, o: Tensor) -> None:
        """y [..., features], o [..., outputs]."""
        device = "cpu" if y.device.type == "mps" else y.device  # which has no float64
        y, o = (x.flatten(0, -2).to(device, torch.float64) for x in (y, o))
        y = nn.functional.pad(y, (0, 1), value=1.0)
        self.gram, self.moment = self.gram.to(device) + y.mT @ y, self.moment.to(device) + y.mT @ o
        self.count += len(y)

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """W [outputs, features] and b [outputs], None without one."""
        gram, moment, b = self.gram[:-1, :-1], self.moment[:-1], None
        mean, target = self.gram[-1, :-1] / self.count, self.moment[-1] / self.count
        if self.bias:
            gram = gram - self.count * torch.outer(mean, mean)
            moment = moment - self.count * torch.outer(mean, target)
        penalty = (self.strength * gram.trace() / len(gram)).clamp(min=torch.finfo(torch.float64).tiny)
        W = torch.cholesky_solve(
            moment, torch.linalg.cholesky(gram + penalty * torch.eye(len(gram)).to(gram))
        ).mT
        if self.bias:
            b = target - W @ mean
        return W, b
