"""What the layers share: the state that they hand on, steps of one token, tensors that stay in float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcikernels.ops import checks


class State(NamedTuple):
    """What a layer remembers of the tokens that it has read, for each of B rows or packed sequences.

    recurrent [B, ...]: its recurrence's. conv [B, D, W-1]: the last inputs of its convolution, the latest
    last. position [B], int64: the number of tokens, from which rotary positions count on. None is what a
    layer does not have.
    """

    recurrent: Tensor
    conv: Tensor | None = None
    position: Tensor | None = None


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of what 16 bits would put off, in a layer of `dtype` (None: torch's default)."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def place_of_state(
    weight: Tensor, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Where and of what a layer with that weight allocates a state, as asked for or as it computes."""
    return {"device": device or weight.device, "dtype": dtype or at_least_float32(weight.dtype)}


class KeepsFloat32:
    """A module whose parameters of the names `in_float32` are never turned into 16 bits by to() or half()."""

    in_float32: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        parameters = [self._parameters[name] for name in self.in_float32]
        exact = [x for p in parameters for x in (p, p.grad) if x is not None]

        def kept(x: Tensor) -> Tensor:
            y = fn(x)
            if y.dtype == x.dtype or not any(x is other for other in exact):
                return y
            return x.to(y.device, at_least_float32(y.dtype))

        return super()._apply(kept, recurse)


class Layer(KeepsFloat32, nn.Module):
    """A sequence mixer. forward reads whole sequences, step one token more; both count on from a State.

    A layer sets `hidden_size` and defines forward, allocate_state and initial_values.
    """

    hidden_size: int

    def step(self, x: Tensor, state: State) -> Tensor:
        """The output at one token, x [B, hidden_size], after those of `state`, which is changed in place.

        Returns [B, hidden_size]. For decoding, under torch.no_grad(): it has no gradient.
        """
        check_step(self, x, state)
        return self(x, state)  # by the one way into a module, where hooks fetch its weights

    def initial_values(self) -> dict[str, Tensor]:
        """What each parameter starts from."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start afresh, as published."""
        for name, value in self.initial_values().items():
            self.get_parameter(name).copy_(value)


def check_input(
    layer: Layer, x: Tensor, state: State | None, cu_seqlens: Tensor | None, keep: Tensor | None
) -> None:
    """x must be [B, T, hidden_size], or with a state [B, hidden_size], which is a step's.

    state must have a row for each of B, or of the sequences that are packed. keep must be bool [B, T], and is
    not needed where sequences are packed.
    """
    name = type(layer).__name__
    step = state is not None and checks.axes(name, "x", x) == 2
    if step:
        check_step(layer, x, state)
    else:
        checks.shape(name, "x", x, "B T hidden_size", {"hidden_size": layer.hidden_size})
    if step and cu_seqlens is not None:
        checks.refuse(name, "cu_seqlens", "None in a step", "boundaries")
    packed, _ = checks.packing(name, cu_seqlens, x)
    if state is not None and not step:
        check_rows(name, state, packed or x.shape[0])
    if keep is None:
        return
    if cu_seqlens is not None:
        checks.refuse(name, "keep", "None with cu_seqlens (leave those tokens out)", "both")
    if step or keep.dtype != torch.bool or keep.shape != x.shape[:2]:
        expected = "None in a step" if step else f"bool [B, T] = {list(x.shape[:2])}"
        checks.refuse(name, "keep", expected, f"{keep.dtype} of shape {tuple(keep.shape)}")


def check_step(layer: Layer, x: Tensor, state: State) -> None:
    """x must be one token of each row of `state`."""
    name = type(layer).__name__
    checks.shape(name, "x", x, "B hidden_size", {"hidden_size": layer.hidden_size})
    if state is None:
        checks.refuse(name, "state", f"a State, as allocate_state({x.shape[0]}) makes one", "None")
    check_rows(name, state, x.shape[0])


def check_rows(name: str, state: State, rows: int) -> None:
    """`state` must be of as many rows, or sequences."""
    if state.recurrent.shape[0] != rows:
        checks.refuse(name, "state", f"of {rows} rows, or sequences", f"one of {state.recurrent.shape[0]}")


def uniform(weight: Tensor) -> Tensor:
    """As torch's own Linear starts: within +-fan_in ** -0.5.  Like weight [out, fan_in]."""
    bound = weight.shape[1] ** -0.5
    return torch.empty_like(weight).uniform_(-bound, bound)


def xavier(weight: Tensor, gain: float = 1.0) -> Tensor:
    """Within +-gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).  Like weight [out, in]."""
    bound = gain * (6 / sum(weight.shape)) ** 0.5
    return torch.empty_like(weight).uniform_(-bound, bound)


def zero_biases(layer: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(x) for name, x in layer.named_parameters() if name.endswith(".bias")}
