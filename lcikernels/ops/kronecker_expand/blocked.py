"""LiGO's expansion in plain torch, a few layers or a block of rows at a time.

Where all old layers share their maps, they are mixed first, in the small space:

    out[i] = write · (sum_j depth[i, j] weight[j]) · readᵀ

Else a block of R rows of every wide old layer is made, mixed into the new ones, and forgotten. With
g[j] = sum_i depth[i, j] grad_out[i], which is mixed like that too, the gradients are

    dweight[j] = write[j]ᵀ g[j] read[j]             dwrite[j] = g[j] read[j] weight[j]ᵀ
    dread[j] = g[j]ᵀ write[j] weight[j]             ddepth[i, j] = <grad_out[i], write[j] weight[j] read[j]ᵀ>

Where units are added, x being a mixed layer, each half of the output is made of the other one, the cheaper
first. With h = grad_out [I; read], s = [I; write]ᵀ grad_out[:, n:]:

    out = [x, x · readᵀ; write · x, write · x · readᵀ]
    dwrite = h[m:] xᵀ          dread = sᵀ x          dx = h[:m] + writeᵀ h[m:]
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import inner

CACHE = 1 << 18  # elements of a block: 1 MB in float32
SHARE = 0.1  # of the output: mixed layers, at most


def forward(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Tensor:
    """out [L2 or L1, M, N]."""
    (L1, m, n), exact = weight.shape, inner(weight)
    L = L1 if depth is None else depth.shape[0]
    out = weight.new_empty(L, write.shape[-2] + m * added, read.shape[-2] + n * added)
    if write.dim() == read.dim() == 2:
        write, read = write.to(exact), read.to(exact)
        for layers in groups(out, weight):
            for i, x in zip(range(L)[layers], mixed(depth, weight, layers)):
                if added:
                    extend(x, write, read, out[i])
                else:
                    out[i] = product(write, x, read)
        return out
    for rows in blocks(weight, write, read):
        wide = widened(weight, write, read, rows)
        out[:, rows] = wide if depth is None else torch.tensordot(depth.to(exact), wide, 1)
    return out


def backward(
    grad_out: Tensor,
    weight: Tensor,
    write: Tensor,
    read: Tensor,
    depth: Tensor | None,
    added: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, write, read and depth; empty ones for what is not needed or missing."""
    exact = inner(weight)
    dweight = weight.new_zeros(weight.shape if need_weight else 0, dtype=exact)
    dwrite, dread = (u.new_zeros(u.shape, dtype=exact) for u in (write, read))
    ddepth = weight.new_zeros(0 if depth is None else depth.shape, dtype=exact)
    if write.dim() == read.dim() == 2:
        shared = write.to(exact), read.to(exact), dwrite, dread
        backward_of_shared(grad_out, weight, *shared, depth, added, dweight, ddepth, need_weight)
    else:
        for rows in blocks(weight, write, read):
            grad = grad_out[:, rows].to(exact)
            g = grad if depth is None else torch.tensordot(depth.to(exact).T, grad, 1)
            w, r = write[..., rows, :].to(exact), read.to(exact)
            h = g @ r
            into(dwrite[..., rows, :], h @ weight.to(exact).mT)
            into(dread, g.mT @ (w @ weight.to(exact)))
            if need_weight:
                dweight += w.mT @ h
            if depth is not None:
                ddepth += dots(grad, widened(weight, write, read, rows))
    return (
        dweight.to(weight.dtype),
        dwrite.to(write.dtype),
        dread.to(read.dtype),
        ddepth.to(weight.dtype),
    )


def backward_of_shared(
    grad_out, weight, write, read, dwrite, dread, depth, added, dweight, ddepth, need_weight
):
    """Adds to the gradients, a few new layers at a time."""
    exact, L = write.dtype, grad_out.shape[0]
    for layers in groups(grad_out, weight):
        dsmall = []
        for i, x in zip(range(L)[layers], mixed(depth, weight, layers)):
            grad = grad_out[i].to(exact)
            if added:
                dsmall.append(extend_backward(grad, x, write, read, dwrite, dread))
                continue
            small = write.T @ grad  # [m, N]
            dwrite.addmm_(grad @ read, x.T)
            dread.addmm_(small.T, x)
            dsmall.append(small @ read)
        dsmall = torch.stack(dsmall)
        if depth is None:
            if need_weight:
                dweight[layers] = dsmall
            continue
        ddepth[layers] = dots(dsmall, weight.to(exact))
        if need_weight:
            dweight += torch.tensordot(depth[layers].to(exact).T, dsmall, 1)


def product(write: Tensor, x: Tensor, read: Tensor) -> Tensor:
    """write · x · readᵀ, the cheaper side first."""
    (M, m), (N, n) = write.shape, read.shape
    return write @ x @ read.T if M * n * (m + N) <= N * m * (n + M) else write @ (x @ read.T)


def extend(x: Tensor, write: Tensor, read: Tensor, out: Tensor) -> None:
    """Writes [I; write] · x · [I; read]ᵀ to out, the cheaper side first."""
    (m, n), (M, N) = x.shape, out.shape
    exact = out if out.dtype == x.dtype else x.new_empty(M, N)
    exact[:m, :n] = x
    if (N - n) * m * n + (M - m) * m * N <= (M - m) * m * n + (N - n) * n * M:
        torch.mm(x, read.T, out=exact[:m, n:])
        torch.mm(write, exact[:m], out=exact[m:])
    else:
        torch.mm(write, x, out=exact[m:, :n])
        torch.mm(exact[:, :n], read.T, out=exact[:, n:])
    if exact is not out:
        out.copy_(exact)


def extend_backward(
    grad: Tensor, x: Tensor, write: Tensor, read: Tensor, dwrite: Tensor, dread: Tensor
) -> Tensor:
    """Adds to dwrite and dread; returns the gradient of x."""
    m, n = x.shape
    h = torch.addmm(grad[:, :n], grad[:, n:], read)
    s = torch.addmm(grad[:m, n:], write.T, grad[m:, n:])
    dwrite.addmm_(h[m:], x.T)
    dread.addmm_(s.T, x)
    return torch.addmm(h[:m], write.T, h[m:])


def dots(x: Tensor, y: Tensor) -> Tensor:
    """<x[i], y[j]>, [i, j], of matrices: row by row, for a float32 sum of a whole matrix loses a digit."""
    return torch.bmm(x.transpose(0, 1), y.permute(1, 2, 0)).sum(0)


def groups(out: Tensor, weight: Tensor) -> Iterator[slice]:
    """New layers, as many at once as make a SHARE of all of them when mixed."""
    most = max(1, int(SHARE * out.numel() / weight[0].numel()))
    for first in range(0, out.shape[0], most):
        yield slice(first, first + most)


def mixed(depth: Tensor | None, weight: Tensor, layers: slice) -> Tensor:
    """Old layers as these new ones mix them."""
    if depth is None:
        return weight[layers].to(inner(weight))
    return torch.tensordot(depth[layers].to(inner(weight)), weight.to(inner(weight)), 1)


def blocks(weight: Tensor, write: Tensor, read: Tensor) -> Iterator[slice]:
    """Rows of the output, as many at once as stay in the cache for all old layers."""
    M, N = write.shape[-2], read.shape[-2]
    most = max(16, CACHE // (weight.shape[0] * N))
    for first in range(0, M, most):
        yield slice(first, first + most)


def widened(weight: Tensor, write: Tensor, read: Tensor, rows: slice) -> Tensor:
    """These rows of every wide old layer, [L1, rows, N]."""
    exact = inner(weight)
    return write[..., rows, :].to(exact) @ weight.to(exact) @ read.to(exact).mT


def into(total: Tensor, parts: Tensor) -> None:
    """Adds parts, one for each old layer, to a gradient that may be shared by them."""
    total += parts if total.dim() == 3 else parts.sum(0)
