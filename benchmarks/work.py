"""The least work that a case can take: of memory, of the processor's units and of a GPU's."""

from typing import NamedTuple

from benchmarks.cases import FORWARD


class Work(NamedTuple):
    """The least a computation must do: bytes in and out of memory, flops through the FMA units."""

    bytes: float
    flops: float = 0


def work(op: str, mode: str, element: int, **sizes: int) -> Work:
    """The forward pass's, and the backward pass's on top of it where gradients are asked for.

    element: bytes of an activation's. gated: of a scan.
    """
    forward, *backward = WORK[op](element, **sizes)
    return forward if mode == FORWARD else Work(*map(sum, zip(forward, *backward)))


def scan_work(element: int, B: int, T: int, D: int, N: int, gated: bool = False) -> tuple[Work, Work]:
    """Instructions of the FMA pipes, 2 flops each, for a state and token: exp2 takes 10, the forward pass 3
    on top; the backward takes 12 to have the states again and 8 for gradients."""
    stream, projected, states = element * B * T * D, element * 2 * B * T * N, B * T * D * N
    forward = Work((3 + gated) * stream + projected, 2 * 13 * states)
    return forward, Work((5 + 2 * gated) * stream + 2 * projected, 2 * 20 * states)


def retention_work(
    element: int, B: int, T: int, H: int, K: int, V: int, G: int | None = None
) -> tuple[Work, Work]:
    """In chunks of 32 with the masked half of each block counted out; the backward recomputes states. G: the
    products of queries and keys are those of so many heads, and decays [B, T, H] are learned."""
    tokens, C, q, v, rates = B * T, 32, (G or H) * K, H * V, H * bool(G)
    forward = Work(element * tokens * (2 * q + 2 * v + rates), tokens * (C * (q + v) + 4 * H * K * V))
    bytes = element * tokens * (4 * q + 3 * v + 2 * rates)
    return forward, Work(bytes, tokens * (C * (3 * q + 2 * v) + 10 * H * K * V))


def conv_work(element: int, B: int, T: int, D: int, W: int) -> tuple[Work, Work]:
    stream = element * B * T * D
    return Work(2 * stream, 2 * W * B * T * D), Work(3 * stream, 4 * W * B * T * D)


def norm_work(element: int, B: int, T: int, D: int, H: int = 1) -> tuple[Work, Work]:
    stream = element * B * T * H * D
    return Work(3 * stream), Work(5 * stream)


def scan_step_work(element: int, B: int, D: int, N: int, gated: bool = True) -> tuple[Work]:
    return (Work(4 * 2 * B * D * N, 2 * 13 * B * D * N),)


def retention_step_work(element: int, B: int, H: int, K: int, V: int) -> tuple[Work]:
    return (Work(4 * 2 * B * H * K * V, 4 * B * H * K * V),)


def inside_work(element: int, B: int, T: int, H: int, P: int, N: int) -> tuple[Work, Work]:
    """Retention with q and k that heads share: the products of queries and keys are one head's work."""
    projected = 2 * H * P + 2 * N + H
    bytes = element * B * T * (projected + H * P), element * B * T * (2 * projected + H * P)
    return tuple(Work(x, pass_.flops) for x, pass_ in zip(bytes, retention_work(element, B, T, H, N, P, G=1)))


def layer_work(element: int, B: int, T: int, H: int, P: int, N: int) -> tuple[Work, Work]:
    weights = H * P // 2 * (3 * H * P + 2 * N + H)
    streams, products = element * (B * T * H * P // 2 + weights), 2 * B * T * weights
    return tuple(
        Work(inside.bytes + factor * streams, inside.flops + factor * products)
        for factor, inside in enumerate(inside_work(element, B, T, H, P, N), 1)
    )


def expansion_work(element: int, L1: int, L2: int, m: int, n: int, M: int, N: int) -> tuple[Work, Work]:
    """The products of new units, the cheaper side first, of the mixed old layers, or of the old ones and then
    the mix, whichever is less; the backward has h = grad [I; read], the part s of [I; write]ᵀ grad, one
    product each for both maps and the mix, and depth's besides."""
    small, more_m, more_n = m * n, M - m, N - n
    forward = min(small * more_m + more_n * n * M, small * more_n + more_m * m * N)
    backward = M * n * more_n + m * more_m * more_n + small * (2 * more_m + more_n)
    read, out = element * (L1 * small + more_m * m + more_n * n), element * L2 * M * N
    return mixed_and_widened(read, out, forward, backward, L1 * L2, ((small, L2), (M * N, L1)))


def dense_work(element: int, L1: int, L2: int, m: int, n: int, M: int, N: int) -> tuple[Work, Work]:
    """Both sides, the cheaper first, of the mixed old layers, or of the old ones and then the mix, whichever
    is less; the backward has h = grad read, s = writeᵀ grad, one product each for both maps and the mix, and
    depth's besides."""
    small, large = m * n, M * N
    read, out = element * (L1 * small + M * m + N * n), element * L2 * large
    forward = min(M * n * (m + N), N * m * (n + M))
    backward = large * (m + n) + small * (M + N + min(M, N))
    return mixed_and_widened(read, out, forward, backward, L1 * L2, ((small, L2), (large, L1)))


def mixed_and_widened(read, out, forward, backward, mixes: int, orders) -> tuple[Work, Work]:
    """forward, backward: products of widening a layer. orders: the size of layers that are mixed, and how
    many are widened."""
    flops = (
        2 * min(times * mixes * size + layers * widening for size, layers in orders)
        for times, widening in ((1, forward), (2, backward))
    )
    return Work(read + out, next(flops)), Work(2 * read + out, next(flops))


WORK = {
    "kronecker_expand": expansion_work,
    "kronecker_expand, dense maps": dense_work,
    "selective_scan": scan_work,
    "selective_scan_step": scan_step_work,
    "retention": retention_work,
    "retention_step": retention_step_work,
    "causal_conv1d": conv_work,
    "gated_rms_norm": norm_work,
    "gated_rms_norm, the gate first": norm_work,
    "a Mamba-2 layer": layer_work,
    "a Mamba-2 layer without its projections": inside_work,
}


def least(sizes: dict[str, int], read: int, x: int, elements: int) -> tuple[tuple[float, float, float], ...]:
    """On a GPU: forward's and backward's bytes, special functions, FLOPs. read, x: of inputs and output."""
    N, K = sizes.get("N"), sizes.get("K", 0)
    forward = read + x, elements * (N + 4 if N else 0), elements * 4 * K
    return forward, (2 * read + x, elements * (2 * N + 6 if N else 0), elements * 10 * K)
