"""Processes that have a sequence in parts: what they give for each of CASES, for test_context_parallel.py.

python tests/ranks.py RANK FOLDER       one of three; the first leaves FOLDER/results.pt
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tolerance import drawn_leaf
from torch import Tensor

from lcikernels import context_parallel, ops

RANKS, DRAWS = 3, 8


class Case(NamedTuple):
    """An op on the parts of a sequence, bounds[rank] to bounds[rank + 1]; more ranks than parts look on."""

    op: Callable
    bounds: tuple[int, ...]
    inputs: dict[str, object]

    def part(self, rank: int, whole: dict[str, object]) -> dict[str, object]:
        """Rank's arguments: tensors of all tokens are cut, a state is for the first."""
        start, end, T = self.bounds[rank], self.bounds[rank + 1], self.bounds[-1]
        cut = {
            name: x[:, start:end] if isinstance(x, Tensor) and x.dim() > 2 and x.shape[1] == T else x
            for name, x in whole.items()
        }
        return cut | ({} if rank == 0 else {"initial_state": None})

    def by_parts(self, reference: Callable) -> Callable:
        """One process's answer: the outputs in a row, and the states behind all parts."""

        def run(**whole):
            outs, states, state = [], [], whole["initial_state"]
            for rank in range(len(self.bounds) - 1):
                out, state = reference(**self.part(rank, whole) | {"initial_state": state})
                outs, states = [*outs, out], [*states, state]
            return torch.cat(outs, 1), torch.stack(states)

        return run


def retention_by_hand(q, k, v, log_decay, *, initial_state, group, return_final_state):
    segment = ops.retention_segment(k, v, log_decay)
    state = context_parallel.entering_state(*segment, initial_state=initial_state, group=group)
    return ops.retention(q, k, v, log_decay, initial_state=state, return_final_state=True)


def selective_scan_by_hand(x, dt, a, b, c, d, *, z, initial_state, group, return_final_state, **steps):
    segment = ops.selective_scan_segment(x, dt, a, b, **steps)
    state = context_parallel.entering_state(*segment, initial_state=initial_state, group=group)
    return ops.selective_scan(x, dt, a, b, c, d, z=z, **steps, initial_state=state, return_final_state=True)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def retention(
    *bounds: int, per_token: bool, heads=(4, 1, 2), dtype=torch.float32, op=context_parallel.retention
) -> Case:
    B, T, H, K, V, (Hq, Hk, Hv) = 2, bounds[-1], max(heads), 5, 3, heads
    exact = torch.promote_types(dtype, torch.float32)
    q, k, v = leaf(B, T, Hq, K, dtype=dtype), leaf(B, T, Hk, K, dtype=dtype), leaf(B, T, Hv, V, dtype=dtype)
    rates = (-0.1 * torch.rand((B, T, H) if per_token else H, dtype=exact)).requires_grad_()
    inputs = dict(q=q, k=k, v=v, log_decay=rates, initial_state=leaf(B, H, K, V, dtype=exact))
    return Case(op, bounds, inputs | {"return_final_state": True})


def scan(*bounds: int, B=2, D=6, dtype=torch.float32, op=context_parallel.selective_scan) -> Case:
    T, N, G = bounds[-1], 3, 2
    x, dt, z = (leaf(B, T, D, dtype=dtype) for _ in range(3))
    b, c = (leaf(B, T, G, N, dtype=dtype) for _ in range(2))
    a = (-torch.rand(D, N, dtype=dtype) * 0.2).requires_grad_()
    inputs = dict(x=x, dt=dt, a=a, b=b, c=c, d=leaf(D, dtype=dtype), z=z, dt_bias=leaf(D, dtype=dtype))
    inputs |= dict(initial_state=leaf(B, D, N, dtype=dtype), dt_softplus=True, return_final_state=True)
    return Case(op, bounds, inputs)


def convolution(*bounds: int, W: int, dtype=torch.float32, silu=True) -> Case:
    B, T, D = 2, bounds[-1], 5
    inputs = dict(x=leaf(B, T, D, dtype=dtype), weight=leaf(D, W, dtype=dtype), bias=leaf(D, dtype=dtype))
    inputs |= dict(initial_state=leaf(B, D, W - 1, dtype=dtype), activation="silu" if silu else None)
    return Case(context_parallel.causal_conv1d, bounds, inputs | {"return_final_state": True})


def without_state(case: Case) -> Case:
    return case._replace(inputs=case.inputs | {"initial_state": None})


def without_rates(case: Case) -> Case:
    return case._replace(inputs=case.inputs | {"log_decay": None})


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    f64 = torch.float64
    return {
        "retention, rates of heads": retention(0, 40, 75, per_token=False),
        "retention, rates of tokens": retention(0, 5, 45, 52, per_token=True),
        "retention, float64": retention(0, 7, 33, 70, per_token=True, heads=(2, 4, 1), dtype=f64),
        "retention, bfloat16": retention(0, 20, 21, 45, per_token=True, dtype=torch.bfloat16),
        "retention, nothing enters": without_state(retention(0, 9, 20, per_token=False, heads=(2, 2, 2))),
        "retention, nothing fades": without_rates(retention(0, 9, 20, per_token=False, heads=(2, 1, 1))),
        "retention by hand": retention(0, 33, 40, 60, per_token=True, op=retention_by_hand),
        "retention by hand, float64": retention(0, 8, 20, per_token=False, dtype=f64, op=retention_by_hand),
        "scan": scan(0, 20, 45),
        "scan, float64": scan(0, 1, 18, 40, dtype=f64),
        "scan, nothing enters": without_state(scan(0, 3, 20, 24)),
        "scan, long": scan(0, 530, 560, B=1),
        "scan by hand": scan(0, 14, 20, 33, op=selective_scan_by_hand),
        "scan by hand, float64": scan(0, 14, 33, dtype=f64, op=selective_scan_by_hand),
        "convolution": convolution(0, 7, 16, W=4),
        "convolution, parts of less than the filter": convolution(0, 1, 3, 9, W=4),
        "convolution, one filter over all": convolution(0, 2, 5, 9, W=9, dtype=f64),
        "convolution, nothing enters": without_state(convolution(0, 2, 3, 9, W=4, silu=False)),
        "convolution of one tap": convolution(0, 4, 9, W=1),
    }


def answer(case: Case, draw: int, rank: int, group) -> dict[str, Tensor]:
    """What tolerance.outputs_and_grads gives: a rank's own outputs, and of gradients its share, summed."""
    generator = torch.Generator().manual_seed(draw)
    whole = {name: drawn_leaf(x, generator, lambda x: x) for name, x in case.inputs.items()}
    out = case.op(**case.part(rank, whole), group=group)
    start, end, ranks = case.bounds[rank], case.bounds[rank + 1], len(case.bounds) - 1
    full = [out[0].new_zeros(out[0].shape[0], case.bounds[-1], *out[0].shape[2:])]
    full.append(out[1].new_zeros(ranks, *out[1].shape))
    cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in full]
    mine = [cotangents[0][:, start:end], cotangents[1][rank]]
    leaves = {name: x for name, x in whole.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), mine, allow_unused=True)
    full[0][:, start:end], full[1][rank] = out[0].detach(), out[1].detach()
    results = {f"output {i}": x for i, x in enumerate(full)}
    for (name, x), grad in zip(leaves.items(), grads):
        results[f"gradient of {name}"] = torch.zeros_like(x) if grad is None else grad.clone()
    everything = torch.cat([x.double().flatten() for x in results.values()])
    dist.all_reduce(everything, group=group)
    sums = everything.split([x.numel() for x in results.values()])
    return {what: sum.view(x.shape).to(x.dtype) for (what, x), sum in zip(results.items(), sums)}


def refusals(rank: int) -> list[str]:
    """Of a state given on the second rank, and of states of other shapes on the first."""
    x, q, state = torch.ones(1, 4, 2), torch.ones(1, 4, 2, 3), torch.ones(1, 2, 3, 3)
    calls = [
        lambda s: context_parallel.retention(q, q, q, -torch.ones(2), initial_state=s[:, : 1 + rank]),
        lambda s: context_parallel.selective_scan(
            x, x, -x[0, :2], x, x, initial_state=s[0, :, :, : 1 + rank]
        ),
        lambda s: context_parallel.causal_conv1d(x, x[0, :2], initial_state=s[0, :1]),
        lambda s: context_parallel.halo(x, 0),
        lambda s: context_parallel.entering_state(s, x[0]),
    ]
    said = []
    for call in calls:
        try:
            call(state)
        except ValueError as refused:
            said.append(str(refused))
    return said


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", where, timedelta(seconds=60), rank=rank, world_size=RANKS)
    groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
    results = {}
    for name, case in cases().items():
        ranks = len(case.bounds) - 1
        if rank < ranks:
            results[name] = [answer(case, draw, rank, groups[ranks]) for draw in range(DRAWS)]
    torch.save(results if rank == 0 else {}, folder / f"results{rank}.pt")
    (folder / f"said{rank}").write_text("\n".join(refusals(rank)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
