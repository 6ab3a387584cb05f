"""LiGO's expansion in plain torch: a new layer at a time, or a block of rows of all old ones.

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

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import inner

# Rows of all layers at a time: 0.5 MB in float32, or a twentieth of the output; of these, so many columns.
CACHE, SHARE, COLUMNS = 1 << 17, 0.05, 512


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

    @property
    def products(self) -> tuple[int, int]:
        """Multiply-adds that widen one layer, write first and read first."""
        _, _, m, n, M, N = self.sizes
        more_m, more_n = M - m * self.added, N - n * self.added
        return more_m * m * n + more_n * n * M, more_n * m * n + more_m * m * N

    @property
    def write_first(self) -> bool:
        return self.products[0] <= self.products[1]

    @property
    def mixes_first(self) -> bool:
        """A stack of maps cannot; and where the depth grows, widening the fewer old ones may cost less."""
        L1, L2, m, n, M, N = self.sizes
        if self.write.dim() == 3 or self.read.dim() == 3:
            return False
        widening, mixing = min(self.products), L1 * L2 if self.depth is not None else 0
        return mixing * m * n + L2 * widening <= mixing * M * N + L1 * widening


def problem(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Problem:
    exact = inner(weight)
    # Detached: of a map that requires a gradient, matmul copies all layers to multiply them as one matrix.
    maps = (u if u is None else u.detach().to(exact) for u in (write, read, depth))
    return Problem(weight.detach(), *maps, added)


def forward(weight: Tensor, write: Tensor, read: Tensor, depth: Tensor | None, added: bool) -> Tensor:
    """out [L2 or L1, M, N]."""
    p = problem(weight, write, read, depth, added)
    _, L2, m, n, M, N = p.sizes
    out = weight.new_empty(L2, M, N)
    if p.mixes_first:
        in_place = added and out.dtype == p.write.dtype
        for i, wide in enumerate(out):
            x = wide[:m, :n] if in_place else p.write.new_empty(m, n)
            mix_into(p, i, x)
            widen(p, x, wide)
        return out
    p = p._replace(weight=p.weight.to(p.write.dtype))
    for rows in blocks(p):
        half = widened(p, rows)
        if added:
            out[:, rows, :n] = mix(p.depth, half)
        for columns, read, _ in columns_of(p):
            out[:, rows, columns] = mix(p.depth, half @ read.mT)
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
    gradients[3] = gradients[3].double()  # few numbers, each a sum over two whole matrices
    by_layers_or_rows = backward_by_layers if p.mixes_first else backward_by_rows
    by_layers_or_rows(p, grad_out, gradients, need_weight)
    return tuple(gradient.to(weight.dtype) for gradient in gradients)


def backward_by_layers(p: Problem, grad_out: Tensor, gradients: Sequence[Tensor], need_weight: bool) -> None:
    """Adds to the gradients, one new layer at a time."""
    dweight, dwrite, dread, ddepth = gradients
    p = p._replace(weight=p.weight.to(p.write.dtype))
    _, L2, m, n, _, _ = p.sizes
    x = p.write.new_empty(m, n)
    for i in range(L2):
        mix_into(p, i, x)
        dx = backward_of_widen(p, grad_out[i].to(x.dtype), x, dwrite, dread)
        if p.depth is not None:
            ddepth[i] = dots(dx[None], p.weight)
        if need_weight and p.depth is None:
            dweight[i] = dx
        elif need_weight:
            dweight.addcmul_(p.depth[i, :, None, None], dx)


def backward_by_rows(p: Problem, grad_out: Tensor, gradients: Sequence[Tensor], need_weight: bool) -> None:
    """Adds to the gradients, a few rows of all old layers at a time."""
    dweight, dwrite, dread, ddepth = gradients
    p = p._replace(weight=p.weight.to(p.write.dtype))
    n = p.weight.shape[2]
    for rows in blocks(p):
        half = widened(p, rows)
        h = torch.zeros_like(half)  # g [I; read]
        if p.added:
            grad = grad_out[:, rows, :n].to(h.dtype)
            h += mix_back(p, grad)
            if p.depth is not None:
                ddepth += dots(grad, half)
        for columns, read, place in columns_of(p):
            grad = grad_out[:, rows, columns].to(h.dtype)
            g = mix_back(p, grad)
            h += g @ read
            if dread.dim() == 3:
                dread[:, place].baddbmm_(g.mT, half)
            elif dread[place].numel() * len(g) <= CACHE:  # as short as the reference's sums, for nothing
                dread[place] += (g.mT @ half).sum(0)
            else:
                dread[place] += g.flatten(0, 1).T @ half.flatten(0, 1)
            if p.depth is not None:
                ddepth += dots(grad, half @ read.mT)
        if (made := made_by(p, rows)) is None:
            if need_weight:
                dweight[:, rows] += h
            continue
        if dwrite.dim() == 2:
            for x, y in zip(h, p.weight):
                dwrite[made].addmm_(x, y.T)
        else:
            dwrite[:, made].baddbmm_(h, p.weight.mT)
        if need_weight:
            dweight.baddbmm_(p.write[..., made, :].mT.expand(len(h), -1, -1), h)


def widen(p: Problem, x: Tensor, out: Tensor) -> None:
    """Writes write · x · readᵀ to out, the cheaper side first."""
    m, n = x.shape
    exact = out if out.dtype == x.dtype else x.new_empty(out.shape)
    if not p.added:
        left, right = (p.write @ x, p.read.T) if p.write_first else (p.write, x @ p.read.T)
        torch.mm(left, right, out=exact)
    elif p.write_first:
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
    m = p.weight.shape[1] * p.added
    return None if rows.stop <= m else slice(rows.start - m, rows.stop - m)


def mix(depth: Tensor | None, layers: Tensor) -> Tensor:
    return layers if depth is None else torch.tensordot(depth, layers, 1)


def mix_back(p: Problem, grad: Tensor) -> Tensor:
    """g, the gradient of what was mixed."""
    return grad if p.depth is None else mix(p.depth.T, grad)


def mix_into(p: Problem, i: int, out: Tensor) -> None:
    """Writes the mix of the old layers that new layer i widens, a few rows of all of them at a time."""
    L1, _, m, n, _, _ = p.sizes
    if p.depth is None:
        out.copy_(p.weight[i])
        return
    most = max(16, CACHE // (L1 * n))
    for first in range(0, m, most):
        rows = slice(first, first + most)
        out[rows] = mix(p.depth[i], p.weight[:, rows].to(out.dtype))


def dots(x: Tensor, y: Tensor) -> Tensor:
    """<x[i], y[j]>, [i, j], of matrices, in float64: of rows in the inputs' dtype, for a float32 sum of a
    whole matrix loses a digit."""
    rows = torch.bmm(y.transpose(0, 1), x.permute(1, 2, 0))  # of the longer one, y, no copy is made
    return rows.sum(0, dtype=torch.float64).T


def blocks(p: Problem) -> Iterator[slice]:
    """Rows of the output, old or new ones, as many at once as make a CACHE or a SHARE for all layers."""
    L1, L2, m, n, M, N = p.sizes
    a_row = L1 * n + (L1 + L2) * min(COLUMNS, N)
    most = max(16, int(max(CACHE, SHARE * L2 * M * N) / a_row))
    for start, stop in ((0, m), (m, M)) if p.added else ((0, M),):
        for first in range(start, stop, most):
            yield slice(first, min(first + most, stop))


def columns_of(p: Problem) -> Iterator[tuple[slice, Tensor, slice]]:
    """Columns of the output that read makes, the part of read that makes them, and its place."""
    kept, rows = p.weight.shape[2] * p.added, p.read.shape[-2]
    for first in range(0, rows, COLUMNS):
        stop = min(first + COLUMNS, rows)
        yield slice(kept + first, kept + stop), p.read[..., first:stop, :], slice(first, stop)
