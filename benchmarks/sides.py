"""The sides that are compared: our ops, and what people without a GPU have for the same today.

transformers' and mambapy's own functions are called where they are functions; torchscale's two forms of
retention are written here from the paper's equations, without its normalisation, which costs extra.
Packages of rivals are imported where they are called, 1 us: bench_gpu.py runs without them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

import lcikernels
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as causal_conv1d_reference
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as gated_rms_norm_reference
from lcikernels.ops.retention.reference import retention as retention_reference
from lcikernels.ops.selective_scan.reference import selective_scan as selective_scan_reference

# float32 whatever the activations are
PARAMETERS = {"a", "d", "dt_bias", "weight", "bias", "log_decay", "state"}


class Side(NamedTuple):
    """`run(**inputs)` is the output.

    Inputs named in `swapped` have axes 1 and 2 exchanged, and then so has the output: each side gets the
    memory layout it likes best. `ours`: it is one of our ops, by the best backend unless one is named.
    threads: of torch's, all unless given. needs: the package that it calls.
    """

    run: Callable[..., Tensor]
    swapped: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    gated: bool = False
    ours: bool = False
    backend: str | None = None
    instructions: str | None = None
    threads: int | None = None
    needs: str | None = None


def ours(op: Callable) -> dict[str, Side]:
    """Our op as it comes, and made to compute otherwise."""
    return {
        "ours": Side(op, ours=True),
        "ours in torch": Side(partial(op, backend="torch"), ours=True, backend="torch"),
        "ours, bfloat16": Side(op, dtype=torch.bfloat16, ours=True),
        "ours, AVX2": Side(op, ours=True, instructions="avx2"),
        "ours, one thread": Side(op, ours=True, threads=1),
    }


# selective_scan


def scan_inputs(gated: bool, B: int, T: int, D: int, N: int) -> dict[str, Tensor]:
    """A fresh Mamba layer's: steps of 0.001 to 0.1, rates of -1 to -N. gated: softplus, bias and gate."""
    x, b, c = torch.randn(B, T, D), torch.randn(B, T, N), torch.randn(B, T, N)
    dt = torch.empty(B, T, D).uniform_(-6.9, -2.3)  # logarithms
    dt = dt if gated else dt.double().exp().float()  # the first float32 exp of a process may be 1e-4 off
    inputs = dict(x=x, dt=dt, a=-torch.arange(1.0, N + 1).repeat(D, 1), b=b, c=c)
    inputs["d"] = torch.ones(D)
    return inputs | dict(z=torch.randn(B, T, D), dt_bias=torch.randn(D) / 8) if gated else inputs


def scan(x, dt, a, b, c, d, z=None, dt_bias=None, **options) -> Tensor:
    options |= dict(z=z, dt_bias=dt_bias, dt_softplus=z is not None)
    return lcikernels.selective_scan(x, dt, a, b, c, d, **options)


def scan_of_channels_first(x, dt, a, b, c, d, z, dt_bias) -> Tensor:
    """mamba-ssm's callers: x, dt, z [B, D, T], b, c [B, N, T], and so is the output."""
    return scan(x.mT, dt.mT, a, b.mT, c.mT, d, z.mT, dt_bias).mT


def scan_reference(x, dt, a, b, c, d, z=None, dt_bias=None, **options) -> Tensor:
    options |= dict(z=z, dt_bias=dt_bias, dt_softplus=z is not None)
    return selective_scan_reference(x, dt, a, b, c, d, **options)


def transformers_scan(x, dt, a, b, c, d, **options) -> Tensor:
    """The scan of transformers' MambaMixer. x, dt [B, D, T]; b, c reach it as views of [B, T, N]."""
    from transformers.models.mamba import modeling_mamba

    return modeling_mamba.mamba_selective_scan(x, dt, a, b.mT, c.mT, d, **options)


def mambapy_scan(x, dt, a, b, c, d) -> Tensor:
    from mambapy.mamba import MambaBlock

    return MambaBlock.selective_scan(None, x, dt, a, b, c, d)


def accelerated_scan(x, dt, a, b, c, d) -> Tensor:
    """By accelerated-scan's recurrence in torch, of D N channels, which take gates and inputs [B, D N, T]."""
    from accelerated_scan.ref import scan

    gates = torch.exp(torch.einsum("btd,dn->bdnt", dt, a)).flatten(1, 2)
    added = torch.einsum("btd,btn->bdnt", dt * x, b).flatten(1, 2)
    states = scan(gates, added).unflatten(1, (-1, a.shape[1]))
    return torch.einsum("bdnt,btn->btd", states, c) + d * x


@cache
def compiled() -> Callable:
    return torch.compile(partial(transformers_scan, use_associative_scan=True), dynamic=False)


SCANS = ours(scan) | {
    "ours, gated": Side(scan, gated=True, ours=True),
    "ours, gated, channels first": Side(
        scan_of_channels_first, ("x", "dt", "b", "c", "z"), gated=True, ours=True
    ),
    "transformers' loop": Side(transformers_scan, ("x", "dt")),
    "compiled associative scan": Side(lambda **inputs: compiled()(**inputs), ("x", "dt")),
    "mambapy": Side(mambapy_scan, needs="mambapy"),
    "accelerated-scan's reference": Side(accelerated_scan, needs="accelerated_scan"),
}


def step_inputs(gated: bool, B: int, D: int, N: int) -> dict[str, Tensor]:
    inputs = {name: u[:, 0] if u.dim() == 3 else u for name, u in scan_inputs(True, B, 1, D, N).items()}
    return inputs | dict(state=torch.randn(B, D, N))


def step(x, dt, a, b, c, d, z, dt_bias, state, **options) -> Tensor:
    options |= dict(state=state, z=z, dt_bias=dt_bias, dt_softplus=True)
    return lcikernels.ops.selective_scan_step(x, dt, a, b, c, d, **options)


def library_step(x, dt, a, b, c, d, z, dt_bias, state) -> Tensor:
    """What is left of the time without our Python: the dispatcher and C++."""
    return torch.ops.lcikernels_cpp.selective_scan_step(x, dt, a, b, c, d, z, dt_bias, True, state, None)


def transformers_step(x, dt, a, b, c, d, z, dt_bias, state) -> Tensor:
    from transformers.models.mamba import modeling_mamba

    return modeling_mamba.mamba_selective_state_update(
        state, x, dt, a, b, c, d, z=z, dt_bias=dt_bias, dt_softplus=True
    )


def step_reference(x, dt, a, b, c, d, z, dt_bias, state) -> Tensor:
    x, dt, b, c, z = (u[:, None] for u in (x, dt, b, c, z))
    options = dict(z=z, dt_bias=dt_bias, dt_softplus=True, initial_state=state)
    return selective_scan_reference(x, dt, a, b, c, d, **options)[:, 0]


# retention


def retention_inputs(gated: bool, B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    return dict(q=torch.randn(B, T, H, K), k=torch.randn(B, T, H, K), v=torch.randn(B, T, H, V))


@cache
def log_decay(H: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet's rates, a constant there as here."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(H, dtype=dtype, device="cpu")))


def retain(q, k, v, **options) -> Tensor:
    return lcikernels.retention(q, k, v, log_decay(v.shape[2]), **options)


@cache
def decays(H: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(log_decay * n): between the tokens of a chunk [H, C, C], since its start, until its end, across it.

    Kept from call to call, as RetNet shares them among its layers.
    """
    rate, t = log_decay(H, torch.float64)[:, None], torch.arange(C, dtype=torch.float64)
    within = (rate[..., None] * (t[:, None] - t)).exp().tril()
    columns = (rate * (t + 1), rate * (C - 1 - t), rate * C)
    return within.to(dtype), *(u.exp().to(dtype)[..., None] for u in columns)


def parallel(q, k, v) -> Tensor:
    """(q k^T * D) v.  q, k, v [B, H, T, K or V].  Sun et al. 2023, eq. 5."""
    H, T, K = q.shape[1:]
    return (q @ k.mT * K**-0.5 * decays(H, T, q.dtype)[0]) @ v


def chunkwise(q, k, v, C: int) -> Tensor:
    """Parallel inside chunks of C tokens, a state from each to the next.  Sun et al. 2023, eq. 7."""
    H, K = q.shape[1], q.shape[3]
    within, since_start, until_end, across = decays(H, C, q.dtype)
    q, k, v = (u.unflatten(2, (-1, C)) for u in (q * K**-0.5, k, v))
    within, since_start, until_end = (u[:, None] for u in (within, since_start, until_end))
    state, states = torch.zeros_like(k[:, :, 0].mT @ v[:, :, 0]), []
    for added in ((k * until_end).mT @ v).unbind(2):  # unbind: indexing would make the backward quadratic
        states.append(state)
        state = across * state + added
    o = (q @ k.mT * within) @ v + (q * since_start) @ torch.stack(states, 2)
    return o.flatten(2, 3)


def chunked_reference(q, k, v) -> Tensor:
    """Not the reference step by step, whose backward keeps 9 GB of states at the shape that is measured."""
    return chunkwise(*(u.transpose(1, 2) for u in (q, k, v)), C=min(128, q.shape[1])).transpose(1, 2)


def fla_retention(q, k, v) -> Tensor:
    """By flash-linear-attention's chunks in torch."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    return naive_chunk_simple_gla(q, k, v, log_decay(q.shape[2]).expand(q.shape[:3]), chunk_size=64)[0]


HEADS_FIRST = ("q", "k", "v")
RETENTIONS = ours(retain) | {
    "parallel": Side(parallel, HEADS_FIRST),
    "chunks of 128": Side(partial(chunkwise, C=128), HEADS_FIRST),
    "chunks of 512": Side(partial(chunkwise, C=512), HEADS_FIRST),  # torchscale's default
    "flash-linear-attention's torch": Side(fla_retention, needs="fla"),
}


def retention_step_inputs(gated: bool, B: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    inputs = {name: u[:, 0] for name, u in retention_inputs(gated, B, 1, H, K, V).items()}
    return inputs | dict(state=torch.randn(B, H, K, V))


def retain_step(q, k, v, state, **options) -> Tensor:
    return lcikernels.ops.retention_step(q, k, v, log_decay(v.shape[1]), state=state, **options)


def retention_step_reference(q, k, v, state) -> Tensor:
    rates = log_decay(v.shape[1]).to(q.dtype)
    return retention_reference(*(u[:, None] for u in (q, k, v)), rates, initial_state=state)[:, 0]


# causal_conv1d, gated_rms_norm


def conv_inputs(gated: bool, B: int, T: int, D: int, W: int) -> dict[str, Tensor]:
    return dict(x=torch.randn(B, T, D), weight=torch.randn(D, W) / 2, bias=torch.randn(D))


def transformers_conv(x, weight, bias) -> Tensor:
    from transformers.models.mamba import modeling_mamba

    return modeling_mamba.causal_conv1d_fn(x, weight, bias, activation="silu")


def conv_of_channels_first(x, weight, bias) -> Tensor:
    return lcikernels.causal_conv1d(x.mT, weight, bias, activation="silu").mT


CONVS = ours(partial(lcikernels.causal_conv1d, activation="silu")) | {
    "ours, channels first": Side(conv_of_channels_first, ("x",), ours=True),
    "transformers' convolution": Side(transformers_conv, ("x",)),
}


def norm_inputs(gated: bool, B: int, T: int, D: int, H: int | None = None) -> dict[str, Tensor]:
    """A weight where there are no heads, as Mamba-2's norm has."""
    if H:
        return dict(x=torch.randn(B, T, H, D), gate=torch.randn(B, T, H, D))
    return dict(x=torch.randn(B, T, D), gate=torch.randn(B, T, D), weight=torch.rand(D) + 0.5)


def torch_norm(x, gate, weight=None) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, 1e-5) * silu(gate)


def torch_norm_of_gated(x, gate, weight) -> Tensor:
    return rms_norm(x * silu(gate), x.shape[-1:], weight, 1e-5)


GATE_FIRST = {"norm_before_gate": False}  # as in Mamba-2
NORMS = ours(lcikernels.gated_rms_norm) | {"plain torch": Side(torch_norm)}
NORMS_OF_GATED = ours(partial(lcikernels.gated_rms_norm, **GATE_FIRST)) | {
    "plain torch": Side(torch_norm_of_gated),
}


# kronecker_expand, where units are added: LiGO's expansion of one kind of matrix in all layers


def expansion_inputs(gated: bool, L1: int, L2: int, m: int, n: int, M: int, N: int) -> dict[str, Tensor]:
    """Maps and depth as after some learning: no zeros."""
    write, read = torch.randn(M - m, m) / m**0.5, torch.randn(N - n, n) / n**0.5
    return dict(weight=torch.randn(L1, m, n), write=write, read=read, depth=torch.randn(L2, L1) / L1**0.5)


def whole(added: Tensor) -> Tensor:
    """The dense map of the equation, [I; C]."""
    return torch.cat([torch.eye(added.shape[1], dtype=added.dtype, device=added.device), added])


def mixed(depth: Tensor, weight: Tensor, i: int) -> Tensor:
    return sum(depth[i, j] * weight[j] for j in range(len(weight)))


def widened_then_mixed(weight, write, read, depth) -> Tensor:
    """Every old layer widened by dense maps, then mixed, layer by layer.  Wang et al. 2023, eq. 6."""
    write, read = whole(write), whole(read)
    wide = [write @ x @ read.T for x in weight]
    return torch.stack([mixed(depth, wide, i) for i in range(len(depth))])


def mixed_then_widened(weight, write, read, depth) -> Tensor:
    """The same with the mix first, as LiGO's code has it."""
    write, read = whole(write), whole(read)
    return torch.stack([write @ mixed(depth, weight, i) @ read.T for i in range(len(depth))])


def new_units_alone(weight, write, read, depth) -> Tensor:
    """And as LiGO's code has it altogether: the products are those of the new units."""
    layers = []
    for i in range(len(depth)):
        x = mixed(depth, weight, i)
        x = torch.cat([x, write @ x])
        layers.append(torch.cat([x, x @ read.T], 1))
    return torch.stack(layers)


EXPANSIONS = {
    "ours": Side(partial(lcikernels.kronecker_expand, added=True), ours=True),
    "layers widened, then mixed": Side(widened_then_mixed),
    "layers mixed, then widened": Side(mixed_then_widened),
    "new units alone": Side(new_units_alone),
}


class Op(NamedTuple):
    """`inputs(gated, **sizes)` are float32, `reference(**inputs)` is as precise as they are.

    fixed: inputs that learn nothing.
    """

    inputs: Callable[..., dict[str, Tensor]]
    reference: Callable[..., Tensor]
    sides: dict[str, Side]
    fixed: tuple[str, ...] = ()


STEPS = {
    "ours": Side(step, ours=True),
    "ours, from C++": Side(library_step, ours=True, backend="cpp"),
    "transformers' step": Side(transformers_step),
}
OPS = {
    "selective_scan": Op(scan_inputs, scan_reference, SCANS),
    "selective_scan_step": Op(step_inputs, step_reference, STEPS),
    "retention": Op(retention_inputs, chunked_reference, RETENTIONS),
    "retention_step": Op(retention_step_inputs, retention_step_reference, ours(retain_step)),
    "causal_conv1d": Op(conv_inputs, partial(causal_conv1d_reference, activation="silu"), CONVS),
    "gated_rms_norm": Op(norm_inputs, gated_rms_norm_reference, NORMS),
    "gated_rms_norm, the gate first": Op(
        norm_inputs, partial(gated_rms_norm_reference, **GATE_FIRST), NORMS_OF_GATED
    ),
    "kronecker_expand": Op(expansion_inputs, new_units_alone, EXPANSIONS, fixed=("weight",)),
}
