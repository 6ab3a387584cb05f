"""LiGO's expansion in plain torch: a few new layers at a time, or a block of rows of all old ones.

Where all old layers share their maps, and mixing them first costs less, that is done, in the small space:

    out[i] = write · (sum_j depth[i, j] weight[j]) · readᵀ

Else a block of R rows of every wide old layer is made, mixed into the new ones, and forgotten. With
g[j] = sum_i depth[i, j] grad_out[i], which is mixed like that too, the gradients are

    dweight[j] = write[j]ᵀ g[j] read[j]             dwrite[j] = g[j] read[j] weight[j]ᵀ
    dread[j] = g[j]ᵀ write[j] weight[j]             ddepth[i, j] = <grad_out[i], write[j] weight[j] read[j]ᵀ>

Where units are added, [I; write] and [I; read] are meant. Of a layer x and its gradient g, the identities
left out, the cheaper side first:

    out = [x, x · readᵀ; write · x, write · x · readᵀ]
    h = g [I; read]          dwrite = h[m:] xᵀ          dx = h[:m] + writeᵀ h[m:]
    s = [I; write]ᵀ g[:, n:]                            dread = sᵀ x
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import inner

CACHE = 1 << 17  # elements of a block: 0.5 MB in float32
SHARE = 0.05  # of the output: mixed layers, or rows of wide ones; two such blocks live at a time


class Problem(NamedTuple):
    """The op's inputs; all but the old layers are in the dtype of the arithmetic."""

    weight: Tensor
    write: Tensor
    read: Tensor
    depth: Tensor | None
    added: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """L1, L2, m, n, M, N."""
        (L1, m, n), L2 = self.weight.shape, len(self.weight if self.depth is None else self.depth)
        return L1, L2, m, n, self.write.shape[-2] + m * self.added, self.read.shape[-2] + n * self.added

    def shared(self) -> bool:
        """All old layers have the same maps."""
        return self.write.dim() == self.read.dim() == 2

    def mixes_first(self) -> bool:
        """A stack of maps cannot; and where the depth grows, widening the fewer old ones may cost less."""
        L1, L2, m, n, M, N = self.sizes
        if not self.shared():
            return False
        widening, mixing = self.products(), L1 * L2 if self.depth is not None else 0
        return mixing * m * n + L2 * widening <= mixing * M * N + L1 * widening

    def products(self) -> int:
        """Multiply-adds that widen one layer."""
        _, _, m, n, M, N = self.sizes
        return min(self.write_first(), (N - n * self.added) * m * n + (M - m * self.added) * m * N)

    def write_first(self) -> int:
        _, _, m, n, M, N = self.sizes
        return (M - m * self.added) * m * n + (N - n * self.added) * n * M


def problem(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Problem:
    exact = inner(weight)
    # Detached: of a map that requires a gradient, matmul copies all layers to multiply them as one matrix.
    maps = (u if u is None else u.detach().to(exact) for u in (write, read, depth))
    return Problem(weight.detach(), *maps, added)


def forward(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Tensor:
    """out [L2 or L1, M, N]."""
    p = problem(weight, write, read, depth, added)
    _, L2, _, n, M, N = p.sizes
    out = weight.new_empty(L2, M, N)
    if p.mixes_first():
        for layers in groups(p):
            for i, x in zip(range(L2)[layers], mixed(p, layers)):
                widen(p, x, out[i])
        return out
    p = p._replace(weight=weight.to(p.write.dtype))
    for rows in blocks(p):
        half = widened(p, rows)
        whole = half @ p.read.mT
        if added:
            out[:, rows, :n] = mix(p.depth, half)
        out[:, rows, n * added :] = mix(p.depth, whole)
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
    p = problem(weight, write, read, depth, added)
    shapes = weight.shape if need_weight else 0, write.shape, read.shape, 0 if depth is None else depth.shape
    gradients = [p.write.new_zeros(shape) for shape in shapes]
    by_layers_or_rows = backward_by_layers if p.mixes_first() else backward_by_rows
    by_layers_or_rows(p, grad_out, *gradients, need_weight)
    return tuple(gradient.to(weight.dtype) for gradient in gradients)


def backward_by_layers(p: Problem, grad_out, dweight, dwrite, dread, ddepth, need_weight: bool) -> None:
    """Adds to the gradients, a few new layers at a time."""
    for layers in groups(p):
        dx = []
        for grad, x in zip(grad_out[layers], mixed(p, layers)):
            grad = grad.to(x.dtype)
            dx.append(backward_of_widen(p, grad, x, dwrite, dread))
        dx = torch.stack(dx)
        if p.depth is None:
            if need_weight:
                dweight[layers] = dx
            continue
        ddepth[layers] = dots(dx, p.weight.to(dx.dtype))
        if need_weight:
            dweight += mix(p.depth[layers].T, dx)


def backward_by_rows(p: Problem, grad_out, dweight, dwrite, dread, ddepth, need_weight: bool) -> None:
    """Adds to the gradients, a few rows of all old layers at a time."""
    p = p._replace(weight=p.weight.to(p.write.dtype))
    kept = p.sizes[3] * p.added  # columns
    for rows in blocks(p):
        grad = grad_out[:, rows].to(p.weight.dtype)
        g = grad if p.depth is None else mix(p.depth.T, grad)
        half, h = widened(p, rows), g[..., kept:] @ p.read
        if p.added:
            h += g[..., :kept]
        into(dread, g[..., kept:].mT @ half)
        if p.depth is not None:
            ddepth += dots(grad[..., kept:], half @ p.read.mT) + dots(grad[..., :kept], half[..., :kept])
        if (made := made_by(p, rows)) is None:
            if need_weight:
                dweight[:, rows] += h
            continue
        into(dwrite[..., made, :], h @ p.weight.mT)
        if need_weight:
            dweight += p.write[..., made, :].mT @ h


def widen(p: Problem, x: Tensor, out: Tensor) -> None:
    """Writes write · x · readᵀ to out, the cheaper side first."""
    write_first = p.write_first() == p.products()
    m, n = x.shape
    exact = out if out.dtype == x.dtype else x.new_empty(out.shape)
    if not p.added:
        left, right = (p.write @ x, p.read.T) if write_first else (p.write, x @ p.read.T)
        torch.mm(left, right, out=exact)
    elif write_first:
        exact[:m, :n] = x
        torch.mm(p.write, x, out=exact[m:, :n])
        torch.mm(exact[:, :n], p.read.T, out=exact[:, n:])
    else:
        exact[:m, :n] = x
        torch.mm(x, p.read.T, out=exact[:m, n:])
        torch.mm(p.write, exact[:m], out=exact[m:])
    if exact is not out:
        out.copy_(exact)


def backward_of_widen(p: Problem, grad: Tensor, x: Tensor, dwrite: Tensor, dread: Tensor) -> Tensor:
    """Adds to dwrite and dread; returns the gradient of x."""
    m, n = x.shape
    if not p.added:
        s = p.write.T @ grad
        dwrite.addmm_(grad @ p.read, x.T)
        dread.addmm_(s.T, x)
        return s @ p.read
    h = torch.addmm(grad[:, :n], grad[:, n:], p.read)
    s = torch.addmm(grad[:m, n:], p.write.T, grad[m:, n:])
    dwrite.addmm_(h[m:], x.T)
    dread.addmm_(s.T, x)
    return torch.addmm(h[:m], p.write.T, h[m:])


def widened(p: Problem, rows: slice) -> Tensor:
    """These rows of write · weight of every old layer, [L1, rows, n]."""
    made = made_by(p, rows)
    return p.weight[:, rows] if made is None else p.write[..., made, :] @ p.weight


def made_by(p: Problem, rows: slice) -> slice | None:
    """The rows of write that make these; none where they are the old layers' own."""
    m = p.sizes[2] * p.added
    return None if rows.stop <= m else slice(rows.start - m, rows.stop - m)


def mix(depth: Tensor | None, layers: Tensor) -> Tensor:
    return layers if depth is None else torch.tensordot(depth, layers, 1)


def mixed(p: Problem, layers: slice) -> Tensor:
    """Old layers as these new ones mix them; of 16 bits one by one: in float32 all take twice the memory."""
    exact = p.write.dtype
    if p.depth is None:
        return p.weight[layers].to(exact)
    if p.weight.dtype == exact:
        return mix(p.depth[layers], p.weight)
    depth, out = p.depth[layers, :, None, None], 0
    for j, x in enumerate(p.weight):
        out = out + depth[:, j] * x.to(exact)
    return out


def dots(x: Tensor, y: Tensor) -> Tensor:
    """<x[i], y[j]>, [i, j], of matrices: row by row, for a float32 sum of a whole matrix loses a digit."""
    return torch.bmm(y.transpose(0, 1), x.permute(1, 2, 0)).sum(0).T  # of the longer one, y, no copy is made


def groups(p: Problem) -> Iterator[slice]:
    """New layers, as many at once as make a SHARE of all of them when mixed."""
    _, L2, m, n, M, N = p.sizes
    most = max(1, int(SHARE * L2 * M * N / (m * n)))
    for first in range(0, L2, most):
        yield slice(first, first + most)


def blocks(p: Problem) -> Iterator[slice]:
    """Rows of the output, old or new ones, as many at once as make a SHARE of it for all old layers."""
    L1, L2, m, n, M, N = p.sizes
    most = max(16, CACHE // (L1 * N), int(SHARE * L2 * M * N / (L1 * (n + N) + L2 * N)))
    for start, stop in ((0, m), (m, M)) if p.added else ((0, M),):
        for first in range(start, stop, most):
            yield slice(first, min(first + most, stop))


def into(total: Tensor, parts: Tensor) -> None:
    """Adds parts, one for each old layer, to a gradient that may be shared by them."""
    total += parts if total.dim() == 3 else parts.sum(0)
