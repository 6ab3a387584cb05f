"""The only place in Python that says no: which op, which argument, what was expected, what came."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

STRIDED = torch.strided
ACTIVATIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)
CHECKED = ContextVar("values of indices on a GPU are checked", default=False)


def refuse(op: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raise the one ValueError."""
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def inner(x: Tensor) -> torch.dtype:
    """What the arithmetic runs in and states are kept in: float32, or float64 where `x` is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# How a tensor must lie for a kernel that counts in elements: one of these four makes it so. Nothing else
# does: cat, float() and empty_like keep the strides of views.
def contiguous(u: Tensor | None) -> Tensor | None:
    """u as kernels read it that are given no strides."""
    return u if u is None else u.contiguous()


def along_rows(x: Tensor) -> Tensor:
    """x with a contiguous last axis, as half of a projection has; kernels are given the others' strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def along_an_axis(x: Tensor) -> Tensor:
    """x [B, T, D] with its channels side by side, or its tokens: memory that is [B, D, T]."""
    return x if x.stride(1) == 1 else along_rows(x)


def rows(x: Tensor) -> Tensor:
    """[rows, D] with a contiguous last axis; no copy where the rows of x are equally far apart."""
    return along_rows(x.reshape(-1, x.shape[-1]))


def channels_first(x: Tensor) -> bool:
    """Whether x [B, T, ..., D] lies in memory as [B, ..., D, T]: mamba-ssm's callers hand such views."""
    return x.dim() > 2 and x.stride(1) == 1 and x.stride(-1) != 1


def empty_as(x: Tensor) -> Tensor:
    """Memory for what x's likes are written to: dense, and where x lies [B, ..., D, T], so too."""
    if channels_first(x):
        return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)
    return x.new_empty(x.shape)


def laid_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of `like`, as empty_as lays it; a copy unless it is."""
    place = empty_as(like)
    return x if (x.dtype, x.stride()) == (place.dtype, place.stride()) else place.copy_(x)


def axes(op: str, argument: str, x: Tensor) -> int:
    """How many `x` has, which must be a tensor whose every element is in memory."""
    if isinstance(x, Tensor) and x.layout is STRIDED and not x.is_nested:
        return x.dim()
    if not isinstance(x, Tensor):
        refuse(op, argument, "a torch.Tensor", "None" if x is None else type(x))
    if x.is_nested:
        refuse(op, argument, "dense (to_padded_tensor() makes it)", "a nested tensor")
    refuse(op, argument, "dense (to_dense() makes it)", x.layout)


def shape(op: str, argument: str, x: Tensor, names: str, sizes: dict[str, int]) -> None:
    """`x` must have the named axes: a size already in `sizes` must agree, a new one is entered there."""
    names = names.split()
    if axes(op, argument, x) != len(names):
        refuse(op, argument, layout(names), f"{x.dim()} axes: shape {tuple(x.shape)}")
    for axis, (name, size) in enumerate(zip(names, x.shape)):
        known = sizes.setdefault(name, size or -1)
        if known != size:
            fits = " at least 1" if known == -1 else f"={known}"
            got = f"{size} on axis {axis} of shape {tuple(x.shape)}"
            refuse(op, argument, f"{layout(names)} with {name}{fits}", got)


def layout(names: list[str]) -> str:
    return f"[{', '.join(names)}]"


def activations(op: str, **tensors: Tensor | None) -> None:
    """The named tensors must share one floating dtype and one device; the first one sets them."""
    (name, first), *others = tensors.items()
    if first.dtype not in ACTIVATIONS:
        refuse(op, name, "float32, float64, bfloat16 or float16", first.dtype)
    for other, x in others:
        if x is not None and x.dtype != first.dtype:
            refuse(op, other, f"{first.dtype} like {name}", x.dtype)
    same_device(op, first, others)


def parameters(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """The named tensors may be of any floating dtype, on the device of `like`."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in ACTIVATIONS:
            refuse(op, name, "float32, float64, bfloat16 or float16", x.dtype)
    same_device(op, like, tensors.items())


def full_precision(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """The named tensors must be float32 (float64 where `like` is), on the device of `like`."""
    for name, x in tensors.items():
        if x is not None and x.dtype != inner(like):
            refuse(op, name, f"{inner(like)} for {like.dtype} activations", x.dtype)
    same_device(op, like, tensors.items())


def states(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """The named tensors may be of what `like` is computed in, or of less, on its device."""
    fits = ACTIVATIONS if like.dtype == torch.float64 else NARROW
    for name, x in tensors.items():
        if x is not None and x.dtype not in fits:
            more = ", float64" if fits is ACTIVATIONS else ""
            refuse(op, name, f"float32{more}, bfloat16 or float16 for {like.dtype} activations", x.dtype)
    same_device(op, like, tensors.items())


def same_device(op: str, like: Tensor, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """The named tensors must be where `like` is."""
    device = like.device
    for name, x in tensors:
        if x is not None and x.device != device:
            refuse(op, name, f"on {device} like the other arguments", x.device)


def no_derivative(op: str, **tensors: Tensor | None) -> None:
    """The named tensors must not ask for derivatives, in reverse or forward mode: the op has none to give."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                refuse(op, name, "without requires_grad (decode under no_grad)", "requires_grad=True")
    if forward_ad._current_level >= 0:
        for name, x in tensors.items():
            if has_tangent(x):
                refuse(op, name, "without a tangent (there is no derivative)", "one of forward mode")


def has_tangent(x: object) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def written(op: str, **tensors: Tensor) -> None:
    """The named tensors are written to: in none may one element of memory stand for several."""
    for name, x in tensors.items():
        if not x.is_contiguous() and overlaps(x):
            refuse(op, name, "of elements of its own (clone() it)", f"strides {x.stride()}")


def overlaps(x: Tensor) -> bool:
    """Whether an axis steps over less than the axes of shorter steps reach, as those of unfold() do."""
    axes = [(stride, size) for size, stride in zip(x.shape, x.stride()) if size > 1]
    for i, (stride, _) in enumerate(axes):
        shorter = [u for j, u in enumerate(axes) if j != i and (u[0] < stride or (u[0] == stride and j < i))]
        if stride <= sum([(size - 1) * step for step, size in shorter]):
            return True
    return False


def one_of(op: str, argument: str, value: object, choices: tuple) -> None:
    """`value` must be one of `choices`, words or small numbers."""
    if not isinstance(value, (str, int, type(None))) or value not in choices:
        refuse(op, argument, " or ".join(map(repr, choices)), repr(value))


def flags(op: str, **values: bool) -> None:
    """The named values must be True or False."""
    for name, value in values.items():
        if value is not True and value is not False:
            refuse(
                op,
                name,
                "True or False",
                repr(value) if isinstance(value, (str, int, type(None))) else type(value),
            )


def number(op: str, argument: str, value: float, least: float = -float("inf")) -> float:
    """`value`, a number not below `least`, of any library that has a float() of its own."""
    try:
        exact = float(value) if isinstance(value, (int, float)) or hasattr(value, "__float__") else None
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of many elements, or of none in memory
        exact = None
    if exact is None:
        refuse(op, argument, "a number", type(value))
    if exact != exact or exact < least:
        refuse(op, argument, "a number" if least == -float("inf") else f"at least {least}", exact)
    return exact


def divides(op: str, argument: str, part: int, whole: int, what: str) -> None:
    """`part` things must be shared evenly by `whole`."""
    if whole % part:
        refuse(op, argument, f"such that its {what} divide {whole}", part)


def positive(op: str, **sizes: int) -> None:
    """The named sizes must be at least 1."""
    for name, size in sizes.items():
        if size < 1:
            refuse(op, name, "at least 1", size)


def packing(
    op: str, cu_seqlens: Tensor | None, like: Tensor, argument: str = "cu_seqlens"
) -> tuple[int | None, Tensor | None]:
    """`cu_seqlens` must be int32 or int64 [N+1] with `like` [1, T, ...]; returns N, and it as int32.

    `boundaries` checks the values.
    """
    if cu_seqlens is None:
        return None, None
    if axes(op, argument, cu_seqlens) != 1 or cu_seqlens.dtype not in INDICES:
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        refuse(op, argument, "int32 or int64 [N+1]", got)
    if cu_seqlens.shape[0] < 2:
        refuse(op, argument, "[N+1] with N at least 1", f"shape {tuple(cu_seqlens.shape)}")
    if like.shape[0] != 1:
        refuse(op, argument, "given only with B=1 (packed sequences share one row)", f"B={like.shape[0]}")
    same_device(op, like, [(argument, cu_seqlens)])
    if cu_seqlens.dtype == torch.int64:  # 2**32 + 5 would become 5, which may fit
        cu_seqlens = cu_seqlens.clamp(-1, 2**31 - 1).to(torch.int32)
    return cu_seqlens.shape[0] - 1, cu_seqlens


def integers(op: str, argument: str, x: Tensor, like: Tensor, sizes: dict[str, int]) -> None:
    """`x` must be int32 or int64 [B], on the device of `like`."""
    shape(op, argument, x, "B", sizes)
    if x.dtype not in INDICES:
        refuse(op, argument, "int32 or int64 [B]", x.dtype)
    same_device(op, like, [(argument, x)])


@contextmanager
def checked() -> Iterator[None]:
    """Inside, the values of cu_seqlens and state_indices on a GPU are checked as those on a CPU always are.

    In this thread; around what torch.compile has compiled, for it cannot be entered there. Each op then waits
    for the GPU, and cannot be captured in a CUDA graph. Outside, wrong values give wrong results, and touch
    no memory but that of the arguments.
    """
    before = CHECKED.set(True)
    try:
        yield
    finally:
        CHECKED.reset(before)


def looked_at(x: Tensor) -> bool:
    """Whether the values of x are to be checked: reading those on a GPU would wait for it."""
    return not x.is_cuda or CHECKED.get()


def in_range(op: str, state_indices: Tensor, S: int, argument: str = "state_indices") -> None:
    """The values of `state_indices`: below S, none twice; negative ones are padding. Reads them."""
    used = [i for i in state_indices.tolist() if i >= 0]
    if max(used, default=0) >= S or len(set(used)) < len(used):
        refuse(op, argument, f"below S={S}, each at most once, or -1", state_indices.tolist())


def boundaries(op: str, cu_seqlens: Tensor, T: int, argument: str = "cu_seqlens") -> list[int]:
    """The values of `cu_seqlens`: 0 first, T last, never falling. Reads them: see `looked_at`."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(start > end for start, end in zip(bounds, bounds[1:])):
        refuse(op, argument, f"0 first, T={T} last and never falling", bounds)
    return bounds
