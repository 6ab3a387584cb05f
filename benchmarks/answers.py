"""Inputs that are drawn, what is called of them, and whether an answer is right: asked before it is timed."""

from collections.abc import Callable
from functools import lru_cache

import torch
from tolerance import Errors, off_by_an_ulp
from torch import Tensor

from benchmarks import expansions, mamba2_layer, measure, retentions, sides
from benchmarks.cases import BACKWARD, FORWARD
from benchmarks.sides import Side

OPS = sides.OPS | retentions.OPS | expansions.OPS | mamba2_layer.OPS
SAME_FUNCTION = 1e-3  # of the largest element, or 4 ulps: a rival's rounding is its own affair
# float32 whatever the activations are; but LiGO's old layers are activations
PARAMETERS = {"a", "d", "dt_bias", "weight", "bias", "log_decay", "state"}
TOKENS = {"x", "dt", "z", "gate", "q", "k", "v", "log_decay"}  # [B, T, D or heads, ...]; b and c [B, T, N]
CHANNELS = 64  # of what is large that are checked
# References that take 10 s of a CPU's products
REFERENCE_ON_GPU = {"kronecker_expand", "kronecker_expand, dense maps"}


def old_layers(name: str, u: Tensor) -> bool:
    return name == "weight" and u.dim() == 3


def learned(name: str, u: Tensor) -> bool:
    """RetNet's decays are not, nor LiGO's old layers."""
    return (name != "log_decay" or u.dim() == 3) and not old_layers(name, u)


def drawn(op: str, sizes: dict[str, int], side: Side) -> dict[str, Tensor]:
    """The same for every side, up to rounding to its dtype."""
    torch.manual_seed(0)
    with torch.device(measure.DEVICE if side.gpu else "cpu"):
        inputs = OPS[op].inputs(**sizes, **gating(op, side))
    kept = {name for name, u in inputs.items() if name in PARAMETERS and not old_layers(name, u)}
    return {name: u if name in kept else u.to(side.dtype) for name, u in inputs.items()}


def gating(op: str, side: Side) -> dict[str, bool]:
    """Which a scan has or has not."""
    return {"gated": side.gated} if op == "selective_scan" else {}


def exchange(u: Tensor, swap: bool) -> Tensor:
    return u.transpose(1, 2) if swap else u


def exchanged(u: Tensor, swap: bool) -> Tensor:
    """A copy, laid out so."""
    return exchange(u, swap).clone(memory_format=torch.contiguous_format)


def laid_out(side: Side, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, as the side likes them best."""
    inputs = {name: exchanged(u, name in side.swapped) for name, u in inputs.items()}
    if "state" in inputs:
        inputs["state"] = inputs["state"].to(side.state)
    return inputs


def cotangent(like: Tensor, swap: bool = False) -> Tensor:
    torch.manual_seed(1)
    return exchanged(torch.randn_like(like), swap)


def prepared(op: str, inputs: dict[str, Tensor], side: Side, mode: str) -> Callable[[], dict[str, Tensor]]:
    """A call to be timed, whose inputs lie ready: what it makes, the output and the gradients, by name."""
    swap, there = bool(side.swapped), laid_out(side, inputs)
    if mode == FORWARD:
        return lambda: {"output": exchange(side.run(**there), swap)}
    grad = cotangent(OPS[op].output(inputs), swap)
    leaves = {name: u.requires_grad_() for name, u in there.items() if learned(name, u)}

    def backward(output: Tensor, again: bool = False) -> dict[str, Tensor]:
        grads = torch.autograd.grad(output, list(leaves.values()), grad, retain_graph=again)
        return {name: exchange(u, name in side.swapped) for name, u in zip(leaves, grads)}

    if mode == BACKWARD:
        output = side.run(**there)
        return lambda: backward(output, again=True)

    def training() -> dict[str, Tensor]:
        output = side.run(**there)
        return {"output": exchange(output.detach(), swap)} | backward(output)

    return training


def part(op: str, sizes: dict[str, int], name: str, u: Tensor) -> Tensor:
    """The last sequence and some channels: no other changes their outputs, nor their tokens' gradients.

    Of the norm, where they do, all channels; of retention the last head of q and k, and all that share it.
    """
    if op == "retention":
        heads = u.shape[2 if u.dim() > 1 else 0]
        shared = slice(heads - heads // sizes.get("G", sizes["H"]), None)
        return u[-1:, :, shared] if u.dim() > 1 else u[shared]
    if name in ("b", "c") or op == "gated_rms_norm":
        return u[-1:] if u.dim() == 3 else u
    chosen = torch.linspace(0, u.shape[2 if name in TOKENS else 0] - 1, CHANNELS, device=u.device).long()
    return u[-1:, :, chosen] if name in TOKENS else u[chosen]


def check(op: str, sizes: dict[str, int], side: Side, answer: dict[str, Tensor], whole: bool) -> None:
    """AssertionError where an answer is wrong, whole or in part."""
    of = Side(None, dtype=side.dtype, gated=side.gated, gpu=side.gpu, bounds=side.bounds)
    for name, (truth, plain) in truths(op, tuple(sizes.items()), of, len(answer) > 1, whole).items():
        got = answer[name] if whole else part(op, sizes, like(op, name), answer[name])
        agree(name, got.to(truth.device), truth, plain, side.ours, OPS[op].products if side.gpu else None)


def like(op: str, name: str) -> str:
    """The input that an output or a gradient is like."""
    return OPS[op].like if name == "output" else name


@lru_cache(maxsize=2)
def truths(op: str, sizes: tuple, side: Side, train: bool, whole: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and gradients by the op's reference, in float64, and in float32 as tests/tolerance.py has it.

    In part: no gradient that is a sum over more.
    """
    sizes = dict(sizes)
    inputs = drawn(op, sizes, side)
    grad, bounds = cotangent(OPS[op].output(inputs)), packed(side, inputs)
    if not whole:
        inputs = {name: part(op, sizes, name, u) for name, u in inputs.items()}
        grad = part(op, sizes, OPS[op].like, grad)
    device = measure.DEVICE if side.gpu and op in REFERENCE_ON_GPU else "cpu"
    answers = []
    for cast in (Tensor.double, off_by_an_ulp):
        given = {name: cast(u.to(device)) for name, u in inputs.items()}
        leaves = {name: u.requires_grad_() for name, u in given.items() if train and learned(name, u)}
        output = OPS[op].reference(**given, **bounds)
        grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output)) if leaves else ()
        answers.append({"output": output.detach()} | dict(zip(leaves, grads)))
    truth, plain = answers
    return {name: (u, plain[name]) for name, u in truth.items() if whole or name in TOKENS | {"output"}}


def packed(side: Side, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a reference is told of packed sequences."""
    if not side.bounds:
        return {}
    return {"cu_seqlens": torch.tensor(side.bounds(inputs["x"].shape[1]), dtype=torch.int32)}


def agree(
    name: str, got: Tensor, truth: Tensor, plain: Tensor, ours: bool, products: torch.dtype | None = None
) -> None:
    """Ours by the rule of tests/tolerance.py, `plain` as there; that a rival computes the same function."""
    errors = Errors.of(got, truth, plain, products)
    budget = errors.budget if ours else max(SAME_FUNCTION, 4 * errors.eps) * errors.largest
    where = f"{got.dtype}, largest {errors.largest:.2e}"
    assert errors.error <= budget, f"{name}: error {errors.error:.2e}, budget {budget:.2e} ({where})"


def same(got: Tensor, want: Tensor, share: float = SAME_FUNCTION) -> None:
    """Of a model's outputs: AssertionError where they differ by more than a share of the largest."""
    error, largest = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= share * largest, f"error {error:.2e}, largest {largest:.2e}"


def wrong(check: Callable, *arguments: object) -> str:
    """What a check that fails says in one line, else nothing. The side is timed all the same, and marked."""
    try:
        check(*arguments)
    except AssertionError as error:
        return str(error).partition("\n")[0] or "wrong"
    return ""


def both_wrong(said: list[str]) -> str:
    """Of ours, else of the rival's."""
    return said[0] or "".join(f"the rival's {x}" for x in said[1:] if x)
