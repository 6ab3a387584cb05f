"""The sides of retention, RetNet's and Mamba-2's: ours, the paper's forms, flash-linear-attention's.

torchscale's two forms are written here from the paper's equations, without its normalisation, which costs
extra.
"""

from functools import cache, partial
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import lcikernels
from benchmarks import rivals
from benchmarks.sides import LONG, OnGpu, Op, Side, ours, ours_on_gpu
from lcikernels.ops.retention.reference import retention as retention_reference


def retention_inputs(B: int, T: int, H: int, K: int, V: int, G: int | None = None) -> dict[str, Tensor]:
    """RetNet's, with its constant decays [H]. G: Mamba-2's, G heads of q and k, learned decays [B, T, H]."""
    q, k, v = torch.randn(B, T, G or H, K), torch.randn(B, T, G or H, K), torch.randn(B, T, H, V)
    if not G:
        return dict(q=q, k=k, v=v, log_decay=log_decay(H).to(q))
    dt = torch.empty(B, T, H).uniform_(-6.9, -2.3).double().exp().float()
    return dict(q=q, k=k, v=v, log_decay=-dt * torch.empty(H).uniform_(1, 16))


def log_decay(H: int) -> Tensor:
    """RetNet's rates, a constant there as here."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(H, dtype=torch.float64, device="cpu")))


def decays(rates: Tensor, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(rate * n): between the tokens of a chunk [H, C, C], since its start, until its end, across it."""
    rate, t = rates.double()[:, None], torch.arange(C, dtype=torch.float64, device=rates.device)
    within = (rate[..., None] * (t[:, None] - t)).exp().tril()
    columns = (rate * (t + 1), rate * (C - 1 - t), rate * C)
    return within.to(dtype), *(u.exp().to(dtype)[..., None] for u in columns)


@cache
def retnet_s(H: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept from call to call, as RetNet shares them among its layers."""
    return decays(log_decay(H), C, dtype)


def parallel(q, k, v, log_decay) -> Tensor:
    """(q k^T * D) v.  q, k, v [B, H, T, K or V].  Sun et al. 2023, eq. 5."""
    H, T, K = q.shape[1:]
    return (q @ k.mT * K**-0.5 * retnet_s(H, T, q.dtype)[0]) @ v


def chunkwise(q, k, v, log_decay, C: int, known: tuple[Tensor, ...] | None = None) -> Tensor:
    """Parallel inside chunks of C tokens, a state from each to the next.  Sun et al. 2023, eq. 7."""
    H, K = q.shape[1], q.shape[3]
    within, since_start, until_end, across = known or retnet_s(H, C, q.dtype)
    q, k, v = (u.unflatten(2, (-1, C)) for u in (q * K**-0.5, k, v))
    within, since_start, until_end = (u[:, None] for u in (within, since_start, until_end))
    state, states = torch.zeros_like(k[:, :, 0].mT @ v[:, :, 0]), []
    for added in ((k * until_end).mT @ v).unbind(2):  # unbind: indexing would make the backward quadratic
        states.append(state)
        state = across * state + added
    o = (q @ k.mT * within) @ v + (q * since_start) @ torch.stack(states, 2)
    return o.flatten(2, 3)


def retain_reference(q, k, v, log_decay) -> Tensor:
    T = q.shape[1]
    if T <= LONG["retention"]:
        return retention_reference(q, k, v, log_decay)
    if log_decay.dim() > 1:
        return lcikernels.retention(q, k, v, log_decay, backend="torch")
    C, heads = gcd(T, 128), (u.transpose(1, 2) for u in (q, k, v))
    return chunkwise(*heads, log_decay, C, decays(log_decay, C, q.dtype)).transpose(1, 2)


def naive_fla(q, k, v, log_decay) -> Tensor:
    """By flash-linear-attention's chunks in torch."""
    naive = rivals.found("fla.ops.simple_gla.naive").naive_chunk_simple_gla
    return naive(q, k, v, log_decay.expand(q.shape[:3]), chunk_size=64)[0]


def fla_retention(q, k, v, log_decay) -> Tensor:
    """It has RetNet's decays, and no others."""
    return rivals.found(rivals.FLA).chunk_retention(q, k, v)[0]


def attention(q, k, v, log_decay) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


HEADS_FIRST = ("q", "k", "v")
RETENTIONS = ours(lcikernels.retention) | {
    "parallel": Side(parallel, HEADS_FIRST),
    "chunks of 128": Side(partial(chunkwise, C=128), HEADS_FIRST),
    "chunks of 512": Side(partial(chunkwise, C=512), HEADS_FIRST),  # torchscale's default
    "flash-linear-attention's torch": Side(naive_fla, needs="fla.ops.simple_gla.naive"),
}
RETENTIONS_ON_GPU = ours_on_gpu(lcikernels.retention) | {
    "flash-linear-attention": OnGpu(fla_retention, needs=rivals.FLA, tuned=True),
    "causal attention": OnGpu(attention, HEADS_FIRST, other=True),
}


def retention_step_inputs(B: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    inputs = retention_inputs(B, 1, H, K, V)
    token = {name: inputs[name][:, 0] for name in HEADS_FIRST}
    return token | dict(log_decay=inputs["log_decay"], state=torch.randn(B, H, K, V))


def retention_step_reference(q, k, v, log_decay, state) -> Tensor:
    return retention_reference(*(u[:, None] for u in (q, k, v)), log_decay, initial_state=state)[:, 0]


STEPS, STEPS_ON_GPU = ours(lcikernels.retention_step), ours_on_gpu(lcikernels.retention_step)
OPS = {
    "retention": Op(retention_inputs, retain_reference, RETENTIONS, RETENTIONS_ON_GPU, "v", torch.bfloat16),
    "retention_step": Op(retention_step_inputs, retention_step_reference, STEPS, STEPS_ON_GPU, "v"),
}
