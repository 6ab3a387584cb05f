"""The sides of kronecker_expand: LiGO's expansion of a kind of matrix in all layers, by its equations."""

from functools import partial

import torch
from torch import Tensor

import lcikernels
from benchmarks.sides import OnGpu, Op, Side, ours_on_gpu
from lcikernels.ops.kronecker_expand.reference import kronecker_expand as kronecker_expand_reference


def expansion_inputs(L1: int, L2: int, m: int, n: int, M: int, N: int) -> dict[str, Tensor]:
    """Maps and depth as after some learning: no zeros."""
    write, read = torch.randn(M - m, m) / m**0.5, torch.randn(N - n, n) / n**0.5
    return dict(weight=torch.randn(L1, m, n), write=write, read=read, depth=torch.randn(L2, L1) / L1**0.5)


def dense_maps(M: int, N: int, m: int, n: int, **layers: int) -> dict[str, Tensor]:
    """write [M, m] and read [N, n], of all units."""
    return expansion_inputs(M=M + m, N=N + n, m=m, n=n, **layers)


def expanded(weight, write, read, depth, added: bool) -> Tensor:
    m, n = weight.shape[1:]
    return weight.new_empty(len(depth), len(write) + m * added, len(read) + n * added)


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


FORMULATIONS = {
    "layers widened, then mixed": widened_then_mixed,
    "layers mixed, then widened": mixed_then_widened,
    "new units alone": new_units_alone,
}
expand = partial(lcikernels.kronecker_expand, added=True)
EXPANSIONS = {"ours": Side(expand, ours=True)} | {name: Side(run) for name, run in FORMULATIONS.items()}
EXPANSIONS_ON_GPU = ours_on_gpu(expand, "cuda") | {name: OnGpu(run) for name, run in FORMULATIONS.items()}
DENSE_ON_GPU = ours_on_gpu(lcikernels.kronecker_expand, "cuda")
ADDED, DENSE = (partial(expanded, added=added) for added in (True, False))
OPS = {
    "kronecker_expand": Op(expansion_inputs, new_units_alone, EXPANSIONS, EXPANSIONS_ON_GPU, ADDED),
    "kronecker_expand, dense maps": Op(dense_maps, kronecker_expand_reference, {}, DENSE_ON_GPU, DENSE),
}
