"""Calls of every op as hypothesis draws them: sizes, dtypes, which arguments, numbers, where those lie.

A call is told by small numbers and words, for one that fails to be read; `made` makes its tensors.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from layouts import along_tokens, half, spaced, transposed
from torch import Tensor

from lcikernels.ops.checks import inner

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = st.sampled_from([F32, F32, BF16, BF16, F16, F64])
FEW = st.integers(1, 9)
WIDTHS = FEW | st.sampled_from([16, 17, 33, 64])
# Around a chunk, and two.
TOKENS = FEW | st.integers(10, 40) | st.sampled_from([31, 32, 33, 63, 64, 65, 129])
INF = float("inf")
# What a tensor may hold, beside normal numbers times a power of 2: any of these at each place.
MIXED = {
    "rates of all kinds": (0.0, -1e-6, -0.1, -1.0, -20.0, -80.0, -1e3, -INF),
    "steps of all kinds": (0.0, 1e-6, 0.1, 1.0, 8.0),
    "huge steps": (0.0, 0.1, 80.0, 1e4),
    "steps before softplus": (-30.0, -20.0, -1.0, 0.0, 1.0, 8.0),
    "slopes of all kinds": (0.0, -1e-6, -1.0, -16.0, -1e3),
    "gates open and shut": (-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0),
    "a few spikes": (0.0, 0.1, -0.1, 1.0, -1.0, 3e3),
    "nothing": (0.0,),
    "-inf": (-INF,),
}
UNIFORM = {
    "gentle rates": -0.2,
    "growing rates": 0.02,
    "gentle steps": 0.5,
    "gentle slopes": -1.0,
    "growing slopes": 0.01,
}


def repeated(x: Tensor) -> Tensor:
    """The first of the first axis in place of all, in its memory."""
    return x[:1].expand(x.shape)


def negative(x: Tensor) -> Tensor:
    """Of memory that holds the negatives, as the imaginary part of a conjugate does."""
    return (-x)._neg_view()


LAYOUTS = {
    "dense": lambda x: x,
    "half": half,
    "spaced": spaced,
    "repeated": repeated,
    "negative": negative,
    "transposed": transposed,
    "along tokens": along_tokens,
}


class Drawn(NamedTuple):
    """A tensor: its shape, dtype, what numbers, how they lie, whether it asks for a gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    numbers: str | int = 0  # of MIXED or UNIFORM, or an exponent of 2
    layout: str = "dense"
    gradient: bool = False

    def made(self) -> Tensor:
        if self.numbers in MIXED:
            choices = torch.tensor(MIXED[self.numbers], dtype=self.dtype)
            x = choices[torch.randint(len(choices), self.shape)]
        elif self.numbers in UNIFORM:
            x = (UNIFORM[self.numbers] * torch.rand(self.shape)).to(self.dtype)
        else:
            x = (torch.randn(self.shape) * 2.0**self.numbers).to(self.dtype)
        return x.requires_grad_(self.gradient)


Call = dict[str, object]


def made(call: Call) -> Call:
    """Its arguments, the same ones each time."""
    torch.manual_seed(0)
    return {name: x.made() if isinstance(x, Drawn) else x for name, x in call.items()}


class Laid(torch.autograd.Function):
    """A tensor in another layout. Its gradient is that of what the op gets, element by element: autograd's
    own of `repeated` would sum what the op has rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: str) -> Tensor:
        return LAYOUTS[layout](x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


def laid(op, call: Call):
    """`op` of arguments that lie as they were drawn to."""

    def run(**arguments):
        for name, x in call.items():
            if isinstance(x, Drawn):
                arguments[name] = Laid.apply(arguments[name], x.layout)
        return op(**arguments)

    return run


def tensor(draw, shape: tuple[int, ...], dtype: torch.dtype, *numbers: str, gradient: bool = True) -> Drawn:
    """A tensor of normal numbers, or of those that are named."""
    if not numbers:
        exponents = [0, 0, 0, -6] if dtype == F16 else [0, 0, 0, -20, 20]
        numbers = (*exponents, "nothing", *([] if dtype == F16 else ["a few spikes"]))
    layouts = [*LAYOUTS][: 4 + min(len(shape), 3)] if 0 not in shape else ["dense"]
    lies = draw(st.just("dense") | st.sampled_from(layouts))
    wants = gradient and draw(st.sampled_from([True, True, True, False]))
    return Drawn(shape, dtype, draw(st.sampled_from(numbers)), lies, wants)


def optional(draw, *given, **named) -> Drawn | None:
    return tensor(draw, *given, **named) if draw(st.booleans()) else None


def parameters(draw, dtype: torch.dtype) -> torch.dtype:
    """float16 with its own kind alone: the gradients of others go beyond what it has."""
    return draw(st.sampled_from([F32, BF16, F64, dtype]))


def packing(draw, T: int) -> tuple[Tensor | None, int]:
    """cu_seqlens of up to five sequences, empty ones too, and how many; None of one batch."""
    if not draw(st.booleans()):
        return None, 0
    inside = sorted(draw(st.lists(st.integers(0, T), max_size=4)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return torch.tensor([0, *inside, T], dtype=dtype), len(inside) + 1


def states(draw, shape: tuple[int, ...], dtype: torch.dtype) -> Drawn | None:
    return optional(draw, shape, draw(st.sampled_from([inner(torch.empty(0, dtype=dtype)), BF16])))


@st.composite
def retention(draw) -> Call:
    dtype, T, K, V = draw(DTYPES), draw(TOKENS), draw(WIDTHS), draw(WIDTHS)
    cu_seqlens, N = packing(draw, T)
    B = 1 if N else draw(st.integers(1, 3))
    H, *shared = draw(st.sampled_from([(1, 1, 1, 1), (3, 3, 3, 3), (2, 2, 1, 2), (4, 4, 1, 2), (4, 2, 4, 1)]))
    exact = inner(torch.empty(0, dtype=dtype))
    rates = (B, T, H) if draw(st.booleans()) else (H,)
    kinds = "gentle rates", "gentle rates", "growing rates", "rates of all kinds", "nothing", "-inf"
    return {
        **{name: tensor(draw, (B, T, h, width), dtype) for name, h, width in zip("qkv", shared, (K, K, V))},
        "log_decay": optional(draw, rates, exact, *kinds),
        "scale": draw(st.sampled_from([None, 0.3, 0.0, -2.0])),
        "initial_state": states(draw, (N or B, H, K, V), dtype),
        "cu_seqlens": cu_seqlens,
        "return_final_state": draw(st.booleans()),
    }


def steps(draw, shape: tuple[int, ...], dtype: torch.dtype, growing: bool) -> Call:
    """dt, its bias, and whether they go through softplus; no huge ones where states grow."""
    softplus, D = draw(st.booleans()), shape[-1]
    if softplus:
        dt = tensor(draw, shape, dtype, 0, "steps before softplus")
        return {"dt": dt, "dt_bias": optional(draw, (D,), parameters(draw, dtype), 0), "dt_softplus": True}
    kinds = "gentle steps", "steps of all kinds", *([] if dtype == F16 or growing else ["huge steps"])
    bias = optional(draw, (D,), parameters(draw, dtype), "gentle steps", "nothing")
    return {"dt": tensor(draw, shape, dtype, *kinds), "dt_bias": bias, "dt_softplus": False}


def scanned(draw, lead: tuple[int, ...], dtype: torch.dtype, gradient: bool = True) -> tuple[Call, int, int]:
    """What a scan and its step both take, D and N."""
    G, N = draw(st.sampled_from([None, 1, 2, 3])), draw(st.integers(1, 5) | st.sampled_from([16, 17]))
    D = draw(FEW | st.sampled_from([17, 40])) * (G or 1)
    groups = (*lead, N) if G is None else (*lead, G, N)
    slopes = draw(st.sampled_from(["gentle slopes", "growing slopes", "slopes of all kinds"]))
    call = {
        "x": tensor(draw, (*lead, D), dtype),
        **steps(draw, (*lead, D), dtype, slopes == "growing slopes"),
        "a": tensor(draw, (D, N), inner(torch.empty(0, dtype=dtype)), slopes),
        "b": tensor(draw, groups, dtype),
        "c": tensor(draw, groups, dtype),
        "d": optional(draw, (D,), parameters(draw, dtype)),
        "z": optional(draw, (*lead, D), dtype, 0, "gates open and shut"),
    }
    if not gradient:
        call = without_gradients(call)
    return call, D, N


@st.composite
def selective_scan(draw) -> Call:
    dtype, T = draw(DTYPES), draw(TOKENS)
    cu_seqlens, S = packing(draw, T)
    B = 1 if S else draw(st.integers(1, 3))
    call, D, N = scanned(draw, (B, T), dtype)
    return call | {
        "initial_state": states(draw, (S or B, D, N), dtype),
        "cu_seqlens": cu_seqlens,
        "return_final_state": draw(st.booleans()),
    }


@st.composite
def causal_conv1d(draw) -> Call:
    dtype, T, D, W = draw(DTYPES), draw(TOKENS), draw(WIDTHS), draw(st.integers(1, 5) | st.just(9))
    cu_seqlens, N = packing(draw, T)
    B = 1 if N else draw(st.integers(1, 3))
    return {
        "x": tensor(draw, (B, T, D), dtype),
        "weight": tensor(draw, (D, W), parameters(draw, dtype)),
        "bias": optional(draw, (D,), parameters(draw, dtype), 0, "gates open and shut"),
        "activation": draw(st.sampled_from([None, "silu"])),
        "initial_state": states(draw, (N or B, D, W - 1), dtype),
        "cu_seqlens": cu_seqlens,
        "return_final_state": draw(st.booleans()),
    }


@st.composite
def gated_rms_norm(draw) -> Call:
    dtype, groups = draw(DTYPES), draw(st.sampled_from([1, 1, 2, 3]))
    D = groups * draw(WIDTHS)
    shape = (*draw(st.lists(st.integers(1, 5), max_size=3)), D)
    return {
        "x": tensor(draw, shape, dtype),
        "gate": optional(draw, shape, dtype, 0, "gates open and shut", "nothing"),
        "weight": optional(draw, (D,), parameters(draw, dtype)),
        "bias": optional(draw, (D,), parameters(draw, dtype)),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        "groups": groups,
        "norm_before_gate": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "sigmoid"])),
        "kind": draw(st.sampled_from(["rms", "layer"])),
    }


@st.composite
def kronecker_expand(draw) -> Call:
    dtype, (L1, L2) = draw(DTYPES), draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    m, n = draw(WIDTHS), draw(WIDTHS)
    added = draw(st.booleans())
    M, N = (draw((st.just(0) if added else st.nothing()) | WIDTHS) for _ in range(2))
    own = [(L1,) if not added and draw(st.booleans()) else () for _ in range(2)]
    return {
        "weight": tensor(draw, (L1, m, n), dtype),
        "write": tensor(draw, (*own[0], M, m), dtype),
        "read": tensor(draw, (*own[1], N, n), dtype),
        "depth": optional(draw, (L2, L1), dtype),
        "added": added,
    }


def indices(draw, B: int) -> tuple[Tensor | None, int]:
    """state_indices of B rows, some of them padding, and how many states there are."""
    if not draw(st.booleans()):
        return None, B
    S = B + draw(st.integers(0, 2))
    order = draw(st.permutations(range(S)))[:B]
    padded = [-1 if draw(st.integers(0, 3)) == 0 else i for i in order]
    return torch.tensor(padded, dtype=draw(st.sampled_from([torch.int32, torch.int64]))), S


def without_gradients(call: Call) -> Call:
    return {name: x._replace(gradient=False) if isinstance(x, Drawn) else x for name, x in call.items()}


def stepped(draw, call: Call, shape: tuple[int, ...], rows: tuple[Tensor | None, int]) -> Call:
    """`call` with a state [., shape] of the arithmetic's dtype; one that is written to is not repeated."""
    first = next(iter(call.values()))
    exact = inner(torch.empty(0, dtype=first.dtype))
    state = tensor(draw, (rows[1], *shape), exact)
    state = state._replace(layout="spaced") if state.layout in ("repeated", "negative") else state
    return without_gradients(call | {"state": state}) | {"state_indices": rows[0]}


@st.composite
def retention_step(draw) -> Call:
    dtype, B, K, V = draw(DTYPES), draw(st.integers(1, 4)), draw(WIDTHS), draw(WIDTHS)
    H, *shared = draw(st.sampled_from([(1, 1, 1, 1), (3, 3, 3, 3), (4, 4, 1, 2), (4, 2, 4, 1)]))
    exact, rates = inner(torch.empty(0, dtype=dtype)), (B, H) if draw(st.booleans()) else (H,)
    token = {name: tensor(draw, (B, h, x), dtype) for name, h, x in zip("qkv", shared, (K, K, V))}
    token["log_decay"] = optional(draw, rates, exact, "gentle rates", "rates of all kinds", "-inf")
    token["scale"] = draw(st.sampled_from([None, 0.3, -2.0]))
    return stepped(draw, token, (H, K, V), indices(draw, B))


@st.composite
def selective_scan_step(draw) -> Call:
    dtype, B = draw(DTYPES), draw(st.integers(1, 4))
    token, D, N = scanned(draw, (B,), dtype, gradient=False)
    return stepped(draw, token, (D, N), indices(draw, B))


@st.composite
def causal_conv1d_step(draw) -> Call:
    dtype, B, D, W = draw(DTYPES), draw(st.integers(1, 4)), draw(WIDTHS), draw(st.integers(1, 5) | st.just(9))
    numbers = st.lists(st.integers(-3, 2**40), min_size=B, max_size=B)
    positions = draw(st.none() | numbers.map(torch.tensor))
    slots = max(W - 1 + draw(st.integers(0, 3)), 1)
    token = {
        "x": tensor(draw, (B, D), dtype),
        "weight": tensor(draw, (D, W), parameters(draw, dtype)),
        "bias": optional(draw, (D,), parameters(draw, dtype), 0, "gates open and shut"),
        "activation": draw(st.sampled_from([None, "silu"])),
        "positions": positions,
    }
    return stepped(draw, token, (D, slots), indices(draw, B))


def steps_by_reference(op: str, reference, **token):
    """What a step returns and makes of its states, by the reference of whole sequences."""
    state, rows, positions = (token.pop(name, None) for name in ("state", "state_indices", "positions"))
    rows = torch.arange(len(state)) if rows is None else rows.long()
    used, after = rows >= 0, state.clone()
    H = max(x.shape[1] for x in map(token.get, "qkv")) if op == "retention_step" else 0
    of_rows = ("q", "k", "v", "x", "dt", "b", "c", "z", *(["log_decay"] if per_row(token) else []))
    token = {name: x[used][:, None] if name in of_rows and x is not None else x for name, x in token.items()}
    y_like = token["v"][:, 0, :1].expand(-1, H, -1) if H else token["x"][:, 0]
    y = y_like.new_zeros(len(rows), *y_like.shape[1:])
    if not used.any():
        return y, after
    before = state[rows[used]]
    if op == "causal_conv1d_step":
        W, slots = token["weight"].shape[1], state.shape[2]
        newest = torch.full((len(rows),), slots) if positions is None else positions
        numbers = newest[used][:, None] + torch.arange(1 - W, 0)
        past = before.gather(2, (numbers % slots)[:, None].expand(-1, before.shape[1], -1))
        out = reference(**token, initial_state=past)
        x = token["x"][:, 0, :, None]
        if positions is None:
            before = torch.cat([before[..., 1:], x], 2)
        else:
            before = before.scatter(2, (newest[used] % slots)[:, None, None].expand_as(x), x)
    else:
        out, before = reference(**token, initial_state=before, return_final_state=True)
    y[used], after[rows[used]] = out[:, 0], before
    return y, after


def per_row(token: Call) -> bool:
    """Whether each row of the batch has rates of its own."""
    return token.get("log_decay") is not None and token["log_decay"].dim() == 2
