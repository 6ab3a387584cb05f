"""Retention in plain torch, chunk by chunk; it saves nothing and recomputes the states in the backward pass.

Inside a chunk retention is a masked matrix product; a state per chunk carries the past. With A the running
sum of log_decay inside the chunk and S the state that enters it:

    P = (q k^T) * exp(A[t] - A[s]) for s <= t        o = P v + exp(A) q . S
    S' = exp(A[end]) S + (exp(A[end] - A) k)^T v

No exponent is positive where memory fades. Tensors lead with the chunk, [NC, B, H, C, *], so that one
chunk's states are contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import inner
from ..packing import sequences


def chunk_size(T: int, K: int, V: int) -> int:
    """At most 32 tokens, 64 for wide heads, in chunks of equal length: 50 tokens are two chunks of 25.

    64 takes a fifth less time at K, V = 128, 256, a third less at 256, 512, and a fifth more at 64, 64.
    """
    most = 64 if K * V > 64 * 64 else 32
    return -(-T // max(1, -(-T // most))) or 1


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the final state [B or N, H, K, V]."""
    if cu_seqlens is not None:
        parts = [
            forward(*cut_out(cut, q, k, v, log_decay), scale, state, None)
            for cut, state in sequences("retention", cu_seqlens, q.shape[1], initial_state)
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([state for _, state in parts])
    c = chunks(q, k, v, log_decay, scale)
    states = carry(c, initial_state)
    o = (c.q @ states[:-1]).mul_(c.since_start)
    o += (c.q @ c.k.mT).mul_(c.within) @ c.v
    return unchunk(o, q.shape[1], o.shape[2], v.dtype), states[-1].clone()


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (zeros [1] where it is not needed) and the initial state."""
    if cu_seqlens is not None:
        parts = []
        for n, (cut, state) in enumerate(sequences("retention", cu_seqlens, q.shape[1], initial_state)):
            inputs = cut_out(cut, q, k, v, log_decay)
            grad_n = None if grad_state is None else grad_state[n : n + 1]
            parts.append(backward(grad_o[:, cut], grad_n, *inputs, scale, state, None, need_log_decay))
        *dqkv, dlog_decay, dstate = zip(*parts)
        per_token = need_log_decay and log_decay.dim() == 3
        dlog_decay = torch.cat(dlog_decay, 1) if per_token else torch.stack(dlog_decay).sum(0)
        return *(torch.cat(x, 1) for x in dqkv), dlog_decay, torch.cat(dstate)

    T, Hq, Hk, Hv = q.shape[1], q.shape[2], k.shape[2], v.shape[2]
    c = chunks(q, k, v, log_decay, scale)
    H, C = c.q.shape[2:4]
    # The last reader of a chunk first: sums begin with what has faded most and are half as wrong.
    c = c._replace(q=c.q.flip(-2), within=c.within.flip(-2), since_start=c.since_start.flip(-2))
    do = chunk(grad_o, H, C, c.q.dtype).flip(-2)
    states = carry(c, initial_state)[:-1]
    dstates = carry_back(c, do, grad_state)

    scores = c.q @ c.k.mT
    dscores = (do @ c.v.mT).mul_(c.within)
    dq = (do @ states.mT).mul_(c.since_start)
    dk = (c.v @ dstates[1:].mT).mul_(c.until_end)
    dlog_decay = q.new_zeros(1, dtype=c.q.dtype)
    if need_log_decay:
        # The decay of token r weighs every pair s < r <= t: sums of its pairs only, never a difference of
        # larger sums.
        pairs = (scores * dscores).flip(-2).tril_(-1)
        d = pad(pairs.cumsum(-1).tril_(-1).sum(-2)[..., :-1], (1, 0))
        d += (c.q * dq).sum(-1).cumsum(-1).flip(-1)  # state -> tokens t >= r
        d += pad((c.k * dk).sum(-1).cumsum(-1)[..., :-1], (1, 0))  # tokens s < r -> next state
        d += (states * dstates[1:]).sum((-1, -2))[..., None] * c.whole.flatten(3)  # state -> next state
        dlog_decay = unchunk(d[..., None], T, H, c.q.dtype)[..., 0]
        dlog_decay = dlog_decay.sum((0, 1)) if log_decay.dim() == 1 else dlog_decay
    dq += dscores @ c.k
    dk += dscores.mT @ c.q
    dv = (c.k @ dstates[1:]).mul_(c.until_end)
    dv += scores.mul_(c.within).mT @ do
    return (
        unchunk(dq.mul_(scale).flip(-2), T, Hq, q.dtype),
        unchunk(dk, T, Hk, k.dtype),
        unchunk(dv, T, Hv, v.dtype),
        dlog_decay.to(log_decay.dtype),
        dstates[0].clone(),
    )


def cut_out(tokens: slice, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """The inputs of these tokens alone."""
    rates = log_decay if log_decay.dim() == 1 else log_decay[:, tokens]
    return q[:, tokens], k[:, tokens], v[:, tokens], rates


class Chunks(NamedTuple):
    """The inputs cut into chunks, and the four decays that a chunk needs."""

    q: Tensor  # [NC, B, H, C, K], scaled
    k: Tensor  # [NC, B, H, C, K]
    v: Tensor  # [NC, B, H, C, V]
    within: Tensor  # [NC, 1 or B, H, C, C]: from token s to token t, 0 where s > t
    since_start: Tensor  # [NC, 1 or B, H, C, 1]: from the state that enters to token t
    until_end: Tensor  # [NC, 1 or B, H, C, 1]: from token s to the end
    whole: Tensor  # [NC, 1 or B, H, 1, 1]: from the state that enters to the one that leaves


def chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Chunks:
    """Cut the inputs and repeat shared heads. One rate per head: one set of decays for the whole batch."""
    T, H, dtype = q.shape[1], max(q.shape[2], k.shape[2], v.shape[2]), inner(q)
    C = chunk_size(T, q.shape[3], v.shape[3])
    # exp(-1e3) is 0, in float64 too. Rates below would swallow their neighbours' in the sums; -inf gives NaN.
    log_decay = log_decay.clamp(min=-1e3)
    rates = log_decay.expand(1, T, H) if log_decay.dim() == 1 else log_decay
    # float64: where a token in the chunk decays by exp(-100), float32 sums leave an error of 1e-5 in its
    # neighbours.
    A = chunk(rates[..., None], H, C, torch.float64).cumsum(-2)
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu_(1)
    return Chunks(
        chunk(q, H, C, dtype).mul_(scale),
        chunk(k, H, C, dtype),
        chunk(v, H, C, dtype),
        (A - A.mT).to(dtype).masked_fill_(later, -torch.inf).exp_(),
        A.exp().to(dtype),
        (A[..., -1:, :] - A).exp().to(dtype),
        A[..., -1:, :].exp().to(dtype),
    )


def chunk(x: Tensor, H: int, C: int, dtype: torch.dtype) -> Tensor:
    """[B, T, h, X] -> [NC, B, H, C, X], a copy; zeros after the end, and head i reads i // (H // h)."""
    B, T, h, X = x.shape
    NC = -(-T // C)
    out = x.new_empty(NC, B, h, H // h, C, X, dtype=dtype)
    if NC * C != T:
        x = pad(x, (0, 0, 0, 0, 0, NC * C - T))
    out.copy_(x.unflatten(1, (NC, C)).permute(1, 0, 3, 2, 4)[:, :, :, None])
    return out.view(NC, B, H, C, X)


def unchunk(x: Tensor, T: int, h: int, dtype: torch.dtype) -> Tensor:
    """[NC, B, H, C, X] -> [B, T, h, X], summed over the heads that share one."""
    NC, B, H, C, X = x.shape
    if h != H:
        x = x.unflatten(2, (h, H // h)).sum(3)
    out = x.new_empty(B, NC, C, h, X, dtype=dtype)
    out.copy_(x.permute(1, 0, 3, 2, 4))
    out = out.view(B, NC * C, h, X)
    return out if NC * C == T else out[:, :T].contiguous()


def carry(c: Chunks, initial_state: Tensor | None) -> Tensor:
    """The states between the chunks, [NC+1, B, H, K, V]: the one that enters first, the final one last."""
    NC, B, H, _, K = c.k.shape
    states = c.k.new_empty(NC + 1, B, H, K, c.v.shape[-1])
    states[0] = 0 if initial_state is None else initial_state
    torch.matmul((c.k * c.until_end).mT, c.v, out=states[1:])
    for i in range(NC):
        states[i + 1].addcmul_(c.whole[i], states[i])
    return states


def carry_back(c: Chunks, do: Tensor, grad_state: Tensor | None) -> Tensor:
    """The gradients of the states between the chunks, in the same places as in `carry`."""
    NC, B, H, _, K = c.k.shape
    dstates = c.k.new_empty(NC + 1, B, H, K, c.v.shape[-1])
    dstates[NC] = 0 if grad_state is None else grad_state
    torch.matmul((c.q * c.since_start).mT, do, out=dstates[:-1])
    for i in reversed(range(NC)):
        dstates[i].addcmul_(c.whole[i], dstates[i + 1])
    return dstates
