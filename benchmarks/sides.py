"""The sides that are compared: our ops, and what people have for the same today, on a CPU and on a GPU.

Here scans, convolutions, norms; the others in retentions.py, expansions.py, mamba2_layer.py. transformers'
and mambapy's own functions are called where they are functions. Packages of rivals are imported where they
are called, 1 us: bench_gpu.py runs without a CPU's.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate, cycle
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

import lcikernels
from benchmarks import rivals
from lcikernels.compat.causal_conv1d import causal_conv1d_fn
from lcikernels.compat.mamba_ssm import selective_scan_fn
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as causal_conv1d_reference
from lcikernels.ops.gated_rms_norm.reference import gated_rms_norm as gated_rms_norm_reference
from lcikernels.ops.selective_scan.reference import selective_scan as selective_scan_reference

# Of more tokens the truth is the torch backend in float64, and for RetNet's decays chunks: retention's
# reference keeps a state a token, 2 MB in float64.
LONG = {"selective_scan": 4096, "retention": 150}


class Side(NamedTuple):
    """`run(**inputs)` is the output.

    Inputs named in `swapped` have axes 1 and 2 exchanged, and then so has the output: each side gets the
    memory layout it likes best. dtype: of activations; state: of a step's state. gpu: it computes there.
    `ours`: it is one of our ops, by the best backend unless one is named. threads: of torch's, all unless
    given. needs: the module of the rival that it calls. bounds: of T tokens, where it takes one row for
    packed sequences. tuned: to the first sizes that it sees, so they are sizes that are timed. other: it
    computes another function, whose answer is not compared.
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
    gpu: bool = False
    bounds: Callable[[int], tuple[int, ...]] | None = None
    state: torch.dtype = torch.float32
    tuned: bool = False
    other: bool = False


class Op(NamedTuple):
    """`inputs(**sizes)` are float32, `reference(**inputs)` is as precise as they are.

    sides, on_gpu: who computes on a CPU, and on a GPU. like: the input that outputs are like, or what makes
    one of all inputs. products: what is multiplied on a GPU is rounded to this dtype.
    """

    inputs: Callable[..., dict[str, Tensor]]
    reference: Callable[..., Tensor]
    sides: dict[str, Side] = {}
    on_gpu: dict[str, Side] = {}
    like: str | Callable[..., Tensor] = "x"
    products: torch.dtype | None = None

    def output(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the output of these inputs is like."""
        return inputs[self.like] if isinstance(self.like, str) else self.like(**inputs)


def ours(op: Callable) -> dict[str, Side]:
    """Our op as it comes, and made to compute otherwise."""
    return {
        "ours": Side(op, ours=True),
        "ours in torch": Side(partial(op, backend="torch"), ours=True, backend="torch"),
        "ours, bfloat16": Side(op, dtype=torch.bfloat16, ours=True),
        "ours, AVX2": Side(op, ours=True, instructions="avx2"),
        "ours, one thread": Side(op, ours=True, threads=1),
    }


OnGpu = partial(Side, dtype=torch.bfloat16, gpu=True)


def ours_on_gpu(op: Callable, kernels: str = "triton", **options) -> dict[str, Side]:
    backends = {"ours": kernels, "ours in torch": "torch"}
    return {name: OnGpu(partial(op, backend=x), ours=True, **options) for name, x in backends.items()}


# selective_scan


def scan_inputs(B: int, T: int, D: int, N: int, gated: bool = False) -> dict[str, Tensor]:
    """A fresh Mamba layer's: steps of 0.001 to 0.1, rates of -1 to -N. gated: softplus, bias and gate."""
    x, b, c = torch.randn(B, T, D), torch.randn(B, T, N), torch.randn(B, T, N)
    dt = torch.empty(B, T, D).uniform_(-6.9, -2.3)  # logarithms
    dt = dt if gated else dt.double().exp().float()  # the first float32 exp of a process may be 1e-4 off
    inputs = dict(x=x, dt=dt, a=-torch.arange(1.0, N + 1).repeat(D, 1), b=b, c=c, d=torch.ones(D))
    return inputs | dict(z=torch.randn(B, T, D), dt_bias=torch.randn(D) / 8) if gated else inputs


def scan(x, dt, a, b, c, d, z=None, dt_bias=None, op=lcikernels.selective_scan, **options) -> Tensor:
    return op(x, dt, a, b, c, d, z=z, dt_bias=dt_bias, dt_softplus=z is not None, **options)


def scan_reference(x, **inputs) -> Tensor:
    if x.shape[1] > LONG["selective_scan"]:
        return scan(x, **inputs, backend="torch")
    return scan(x, **inputs, op=selective_scan_reference)


def scan_of_channels_first(x, dt, a, b, c, d, z, dt_bias) -> Tensor:
    """mamba-ssm's callers: x, dt, z [B, D, T], b, c [B, N, T], and so is the output."""
    return scan(x.mT, dt.mT, a, b.mT, c.mT, d, z.mT, dt_bias).mT


def scan_called_as_mamba_ssm_s(x, dt, a, b, c, d, z, dt_bias) -> Tensor:
    return selective_scan_fn(x, dt, a, b, c, d, z, dt_bias, delta_softplus=True)


def transformers_scan(x, dt, a, b, c, d, **options) -> Tensor:
    """The scan of transformers' MambaMixer. x, dt [B, D, T]; b, c reach it as views of [B, T, N]."""
    from transformers.models.mamba import modeling_mamba

    return modeling_mamba.mamba_selective_scan(x, dt, a, b.mT, c.mT, d, **options)


@cache
def compiled() -> Callable:
    return torch.compile(partial(transformers_scan, use_associative_scan=True), dynamic=False)


def mambapy_scan(x, dt, a, b, c, d) -> Tensor:
    return rivals.found("mambapy.mamba").MambaBlock.selective_scan(None, x, dt, a, b, c, d)


def accelerated_scan(x, dt, a, b, c, d) -> Tensor:
    """By accelerated-scan's recurrence in torch, of D N channels, which take gates and inputs [B, D N, T]."""
    gates = torch.exp(torch.einsum("btd,dn->bdnt", dt, a)).flatten(1, 2)
    added = torch.einsum("btd,btn->bdnt", dt * x, b).flatten(1, 2)
    states = rivals.found("accelerated_scan.ref").scan(gates, added).unflatten(1, (-1, a.shape[1]))
    return torch.einsum("bdnt,btn->btd", states, c) + d * x


class CudaScan(torch.autograd.Function):
    """mamba-ssm's, all [B, D, T]; b, c [B, N, T]. Softplus, bias, skip and gate are fused."""

    @staticmethod
    def forward(ctx, x, dt, a, b, c, d, z, dt_bias):
        inputs = x, dt, a, b[:, None], c[:, None], d, z, dt_bias
        ungated, states, y = rivals.found(rivals.SCAN).fwd(*inputs, True)
        ctx.save_for_backward(*inputs, states, ungated)
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, states, ungated = ctx.saved_tensors
        backward = rivals.found(rivals.SCAN).bwd
        dx, ddt, da, db, dc, dd, dbias, dz = backward(*inputs, dy, states, ungated, None, True, False)
        return dx, ddt, da, db.squeeze(1), dc.squeeze(1), dd, dz, dbias


def cuda_scan(x, dt, a, b, c, d, z, dt_bias) -> Tensor:
    return CudaScan.apply(x, dt, a, b, c, d, z, dt_bias)


@cache
def bounds_of(T: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Sequences of these lengths, again and again; the last is cut at T."""
    ends = []
    for end in accumulate(cycle(lengths)):
        ends.append(min(end, T))
        if end >= T:
            return (0, *ends)


def mixed_lengths(T: int) -> tuple[int, ...]:
    return bounds_of(T, (700, 64, 2500, 1, 333, 1100, 90, 4096))


def eighths(T: int) -> tuple[int, ...]:
    return bounds_of(T, (T // 8,))


@cache
def on(device: torch.device, bounds: tuple[int, ...]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def packed(x, **inputs) -> Tensor:
    return scan(x, **inputs, cu_seqlens=on(x.device, mixed_lengths(x.shape[1])), backend="triton")


def in_rows(**inputs) -> Tensor:
    """[1, T, ...] as 8 rows."""
    rows = {name: u.unflatten(1, (8, -1))[0] if u.dim() == 3 else u for name, u in inputs.items()}
    return scan(**rows, backend="triton").flatten(0, 1)[None]


TURNED = "x", "dt", "b", "c", "z"
SCANS = ours(scan) | {
    "ours, gated": Side(scan, gated=True, ours=True),
    "ours, gated, channels first": Side(scan_of_channels_first, TURNED, gated=True, ours=True),
    "transformers' loop": Side(transformers_scan, ("x", "dt")),
    "compiled associative scan": Side(lambda **inputs: compiled()(**inputs), ("x", "dt")),
    "mambapy": Side(mambapy_scan, needs="mambapy.mamba"),
    "accelerated-scan's reference": Side(accelerated_scan, needs="accelerated_scan.ref"),
}
SCANS_ON_GPU = ours_on_gpu(scan, gated=True) | {
    "ours, packed": OnGpu(packed, gated=True, ours=True, bounds=mixed_lengths),
    "ours, 8 rows": OnGpu(in_rows, gated=True, ours=True, bounds=eighths),
    "ours, [B, D, T]": OnGpu(scan_called_as_mamba_ssm_s, TURNED, gated=True, ours=True),
    "mamba-ssm": OnGpu(cuda_scan, TURNED, gated=True, needs=rivals.SCAN),
}


def step_inputs(B: int, D: int, N: int) -> dict[str, Tensor]:
    inputs = scan_inputs(B, 1, D, N, gated=True).items()
    return {name: u[:, 0] if u.dim() == 3 else u for name, u in inputs} | dict(state=torch.randn(B, D, N))


step = partial(scan, op=lcikernels.ops.selective_scan_step)


def library_step(x, dt, a, b, c, d, z, dt_bias, state) -> Tensor:
    """What is left of the time without our Python: the dispatcher and C++."""
    return torch.ops.lcikernels_cpp.selective_scan_step(x, dt, a, b, c, d, z, dt_bias, True, state, None)


def transformers_step(x, dt, a, b, c, d, state, **gate) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    return mamba_selective_state_update(state, x, dt, a, b, c, d, **gate, dt_softplus=True)


def cuda_step(x, dt, a, b, c, d, state, **gate) -> Tensor:
    update = rivals.found(rivals.UPDATE).selective_state_update
    return update(state, x, dt, a, b, c, d, **gate, dt_softplus=True)


def step_reference(a, d, dt_bias, state, **token) -> Tensor:
    token = {name: u[:, None] for name, u in token.items()}
    return scan_reference(**token, a=a, d=d, dt_bias=dt_bias, initial_state=state)[:, 0]


STEPS = {
    "ours": Side(step, ours=True),
    "ours, from C++": Side(library_step, ours=True, backend="cpp"),
    "transformers' step": Side(transformers_step),
}
STEPS_ON_GPU = ours_on_gpu(step) | {"mamba-ssm": OnGpu(cuda_step, needs=rivals.UPDATE)}

# causal_conv1d, gated_rms_norm


def conv_inputs(B: int, T: int, D: int, W: int) -> dict[str, Tensor]:
    return dict(x=torch.randn(B, T, D), weight=torch.randn(D, W) / 2, bias=torch.randn(D))


def transformers_conv(x, weight, bias) -> Tensor:
    from transformers.models.mamba import modeling_mamba

    return modeling_mamba.causal_conv1d_fn(x, weight, bias, activation="silu")


def conv_of_channels_first(x, weight, bias) -> Tensor:
    return lcikernels.causal_conv1d(x.mT, weight, bias, activation="silu").mT


def cuda_conv(x, weight, bias) -> Tensor:
    return rivals.found(rivals.CONV).causal_conv1d_fn(x, weight, bias, activation="silu")


def cuda_conv_step(x, weight, bias, state) -> Tensor:
    return rivals.found(rivals.CONV).causal_conv1d_update(x, state, weight, bias, "silu")


def conv_step_inputs(B: int, D: int, W: int) -> dict[str, Tensor]:
    inputs = conv_inputs(B, 1, D, W)
    return inputs | dict(x=inputs["x"][:, 0], state=torch.randn(B, D, W - 1))


def conv_step_reference(x, weight, bias, state) -> Tensor:
    return conv_reference(x[:, None], weight, bias, initial_state=state)[:, 0]


conv, conv_step, conv_reference, conv_called_as_theirs = (
    partial(op, activation="silu")
    for op in (
        lcikernels.causal_conv1d, lcikernels.causal_conv1d_step, causal_conv1d_reference, causal_conv1d_fn
    )
)  # fmt: skip
CONVS = ours(conv) | {
    "ours, channels first": Side(conv_of_channels_first, ("x",), ours=True),
    "transformers' convolution": Side(transformers_conv, ("x",)),
}
CONVS_ON_GPU = ours_on_gpu(conv) | {
    "ours, [B, D, T]": OnGpu(conv_called_as_theirs, ("x",), ours=True),
    "causal-conv1d": OnGpu(cuda_conv, ("x",), needs=rivals.CONV),
}
CONV_STEPS = ours_on_gpu(conv_step) | {
    "causal-conv1d": OnGpu(cuda_conv_step, needs=rivals.CONV, state=torch.bfloat16)
}


def norm_inputs(B: int, T: int, D: int, H: int | None = None) -> dict[str, Tensor]:
    """A weight where there are no heads, as Mamba-2's norm has."""
    shape = (B, T, H, D) if H else (B, T, D)
    inputs = dict(x=torch.randn(shape), gate=torch.randn(shape))
    return inputs if H else inputs | dict(weight=torch.rand(D) + 0.5)


def torch_norm(x, gate, weight=None) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, 1e-5) * silu(gate)


def torch_norm_of_gated(x, gate, weight) -> Tensor:
    return rms_norm(x * silu(gate), x.shape[-1:], weight, 1e-5)


norm = lcikernels.gated_rms_norm
norm_of_gated, norm_of_gated_reference = (
    partial(op, norm_before_gate=False)
    for op in (norm, gated_rms_norm_reference)  # as in Mamba-2
)
NORMS = ours(norm) | {"plain torch": Side(torch_norm)}
NORMS_OF_GATED = ours(norm_of_gated) | {"plain torch": Side(torch_norm_of_gated)}
OPS = {
    "selective_scan": Op(scan_inputs, scan_reference, SCANS, SCANS_ON_GPU),
    "selective_scan_step": Op(step_inputs, step_reference, STEPS, STEPS_ON_GPU),
    "causal_conv1d": Op(conv_inputs, conv_reference, CONVS, CONVS_ON_GPU),
    "causal_conv1d_step": Op(conv_step_inputs, conv_step_reference, on_gpu=CONV_STEPS),
    "gated_rms_norm": Op(norm_inputs, gated_rms_norm_reference, NORMS, ours_on_gpu(norm)),
    "gated_rms_norm, the gate first": Op(norm_inputs, norm_of_gated_reference, NORMS_OF_GATED),
}
