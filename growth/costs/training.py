"""What training a model takes on one GPU, or on several that share it out (FSDP2), as `growth train` does it.

    each GPU holds      (4 + 4 + 8) P / N     weights and gradients in float32, Adam's two moments
                        4 (p + q)             a layer's weights gathered, and the next one's
                        4 p                   the gradients of the layer before, on their way
                        what a step makes     growth.costs.paper; copies of weights in 16 bits are among it
    and receives        4 (3 P - p of the head) (N - 1) / N a step: weights forward and backward, gradients

One GPU has all of it at once. Checked on CPUs: the first line and what is received, of two processes; a step
in float32 and under autocast. What any GPU takes besides its tensors has been measured on none.
"""

from dataclasses import dataclass, field

from growth.costs.machines import UTILISATION, Gpu
from growth.costs.paper import Precision, Step, step_of
from growth.families.table import Model

WEIGHT, MOMENTS, GRADIENT, GATHERED = 4, 8, 4, 4  # bytes a parameter


@dataclass(frozen=True)
class Training:
    """On each of `gpus`: bytes of its share of weights, moments, gradients. working: the most that lives
    besides in a step, gathered weights among it. memory: the most of all together. communicated: bytes
    received a step. seconds: of a step of `tokens` on all GPUs, at UTILISATION, communication behind it."""

    gpus: int
    fits: bool
    checkpointing: bool
    weights: float
    moments: float
    gradients: float
    working: float
    memory: float
    communicated: float
    flops: int
    tokens: int
    seconds: float


def state(parameters: int, gpus: int) -> float:
    """Bytes that each GPU holds between steps."""
    return (WEIGHT + MOMENTS) * parameters / gpus


def most(step: Step, parameters: int, gpus: int) -> float:
    """The most bytes that each GPU holds."""
    if gpus == 1:
        return state(parameters, 1) + step.most(GRADIENT)
    sizes = [x.parameters for x in step.layers]

    def gathered(layer: int | None) -> float:
        if layer is None:
            return GATHERED * (step.head.parameters + sizes[-1])
        return GATHERED * (sizes[layer] + sizes[max(layer - 1, 0)] + sizes[min(layer + 1, len(sizes) - 1)])

    return state(parameters, gpus) + step.most(GRADIENT / gpus, gathered)


@dataclass(frozen=True)
class Steps:
    """A model's steps of B windows of T tokens, each of which is worked out once."""

    model: Model
    B: int
    T: int
    known: dict[tuple[bool, Precision], Step] = field(default_factory=dict, compare=False, repr=False)

    def step(self, checkpointing: bool, precision: Precision) -> Step:
        asked = checkpointing, precision
        if asked not in self.known:
            found = step_of(self.model, self.B, self.T, checkpointing=checkpointing, precision=precision)
            self.known[asked] = found
        return self.known[asked]


def training_of(steps: Steps, gpu: Gpu, gpus: int) -> Training:
    """With layers computed again in the backward (--gradient-checkpointing) where it would not fit else."""
    P = steps.model.architecture.parameters
    for checkpointing in (False, True):
        step = steps.step(checkpointing, "autocast")
        if fits := (memory := most(step, P, gpus)) <= gpu.memory:
            break
    held = state(P, gpus) + GRADIENT * P / gpus
    received = GATHERED * (3 * P - step.head.parameters) * (gpus - 1) / gpus
    seconds = max(step.flops / (gpu.flops * UTILISATION), received / gpu.receives(gpus))
    shares = (x * P / gpus for x in (WEIGHT, MOMENTS, GRADIENT))
    return Training(
        gpus,
        fits,
        checkpointing,
        *shares,
        memory - held,
        memory,
        received,
        step.flops,
        gpus * step.tokens,
        seconds,
    )
