"""Every number of the demo and of its larger scales: sizes, steps and rates."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from growth.methods import METHODS


@dataclass(frozen=True)
class Size:
    """ffn: its width; None: four times the hidden one."""

    layers: int
    hidden: int
    heads: int
    ffn: int | None = None


@dataclass(frozen=True)
class Budget:
    """Steps, peak learning rate, warm-up in steps, the share of the steps in which the rate falls (LEMON's
    schedule; 1 is a cosine over all of them). rate: None takes the best of the family's `rates`.
    """

    steps: int
    rate: float | None
    warmup: int
    decay: float = 1.0


@dataclass(frozen=True)
class Lesson:
    """What methods that learn get; rate: None for the methods' own. A step costs what one of training does,
    with as many examples."""

    steps: int
    batch_size: int
    rate: float | None = None


@dataclass(frozen=True)
class Corpus:
    """bytes: of the text, at most; vocabulary: tokens that a BPE is trained to, 0 for a token a byte; length:
    tokens of a window; words: tokens that each model writes; packages: of those installed, too."""

    bytes: int
    vocabulary: int
    length: int
    words: int
    packages: bool = False


@dataclass(frozen=True)
class Numbers:
    """A source, the larger model that it is grown to, and what training gets.

    model       a key of growth.demo.models.MODELS
    budgets     by an arm's name, else by its group's: "growth", "transfer". Baselines are "scratch", "scratch
                of X", else "scratch of any"; "source" has its own
    arms        those to train beside baselines
    first       of those, the ones whose every seed comes before the others
    align       steps of aligning, by an arm's name, else "transfer"; of one window each, on `windows` ones
    copied      the share of the rate for what was transferred as it is
    evaluations how often the loss is measured on `held_out` examples
    rates       the grid
    """

    model: str
    source: Size
    target: Size
    budgets: Mapping[str, Budget]
    learning: Lesson
    batch_size: int
    held_out: int
    evaluations: int
    arms: tuple[str, ...]
    first: tuple[str, ...] = ()
    align: Mapping[str, int] = field(default_factory=dict)
    windows: int = 64
    copied: float = 0.3
    corpus: Corpus | None = None
    rates: tuple[float, ...] = ()
    bf16: bool = False

    @property
    def digest(self) -> str:
        """Of all but the arms: results of two digests are not to be compared."""
        told = json.dumps(asdict(replace(self, arms=(), first=())), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Scale:
    """parted: an arm has a run that arrives early and one of as many FLOPs as its baseline; else one of its
    budget's steps. keep: checkpoints stay."""

    name: str
    families: Mapping[str, Numbers]
    seeds: tuple[int, ...] = (0,)
    parted: bool = False
    keep: bool = True
    # A second thread gains a quarter at these sizes; on a busy machine, waiting for it costs ten times that.
    threads: int = 1


def _moved(**arms: tuple[int, float, float, int, float]) -> dict[str, Budget]:
    """The budgets of transfers, each of (steps, its baseline's rate, its own, warm-up, decay)."""
    found = {}
    for name, (steps, fresh, rate, warmup, decay) in arms.items():
        found[f"scratch of {name}"] = Budget(steps, fresh, steps // 20)
        found[name] = Budget(steps, rate, warmup, decay)
    return found


def _grown(steps: int) -> dict[str, Budget]:
    """The budgets of growth, of the grid's rates; what carries its optimizer along needs no warm-up."""
    carried = dict.fromkeys(("lemon-carried", "lemon-early"), Budget(steps, None, 0))
    return {"growth": Budget(steps, None, steps // 20), **carried}


def _longer(budget: Budget, times: int) -> Budget:
    return replace(budget, steps=times * budget.steps, warmup=times * budget.warmup)


# The demo's numbers were chosen in trials on its text, transfers' on windows that it does not measure on.
ALL = ("lemon", *(name for name in METHODS if name != "lemon"), "lemon-carried", "lemon-early")
MOVED = ("retnet", "retnet-learned", "mamba", "mamba2", "hybrid")
DEMO = Scale(
    "demo",
    {
        "text": Numbers(
            model="gpt_neox",
            source=Size(3, 64, 2),
            target=Size(4, 96, 3),
            budgets={
                "source": Budget(350, 8e-3, 17),
                "scratch": Budget(400, 5e-3, 20),
                "growth": Budget(400, 5e-3, 40, 0.43),
                "lemon-carried": Budget(400, 5e-3, 0, 0.43),
                "lemon-early": Budget(400, 5e-3, 0, 0.3),
            }
            | _moved(
                **{
                    "retnet": (470, 1.5e-2, 1e-2, 10, 0.45),
                    "retnet-learned": (300, 2e-2, 1e-2, 10, 0.55),
                    "mamba": (130, 2e-2, 1.2e-2, 10, 0.6),
                    "mamba2": (115, 1.2e-2, 1.2e-2, 10, 0.7),
                    "hybrid": (360, 1.5e-2, 1e-2, 10, 0.35),
                }
            ),
            align={"retnet": 320, "retnet-learned": 200, "mamba": 160, "mamba2": 160, "hybrid": 200},
            learning=Lesson(5, 8),
            batch_size=8,
            corpus=Corpus(4_000_000, 0, 128, 80),
            held_out=128,
            evaluations=12,
            arms=ALL + MOVED,
        ),
        "images": Numbers(
            model="vit",
            source=Size(2, 32, 2),
            target=Size(3, 48, 3),
            budgets={
                "source": Budget(600, 5e-3, 30),
                "scratch": Budget(700, 5e-3, 35),
                "growth": Budget(700, 5e-3, 70, 0.5),
            },
            learning=Lesson(25, 32, 5e-3),
            batch_size=32,
            held_out=256,
            evaluations=10,
            arms=("lemon", "ligo"),
        ),
    },
)
QUICK = Scale(
    "quick",
    {
        "text": Numbers(
            model="gpt_neox",
            source=Size(2, 32, 2),
            target=Size(3, 48, 3),
            budgets={
                "source": Budget(60, 8e-3, 3),
                "scratch": Budget(80, 8e-3, 4),
                "growth": Budget(80, 8e-3, 8, 0.6),
                "lemon-carried": Budget(80, 8e-3, 0, 0.6),
                "lemon-early": Budget(80, 8e-3, 0, 0.45),
            }
            | _moved(
                **{
                    "retnet": (100, 1.5e-2, 1e-2, 5, 0.6),
                    "retnet-learned": (100, 1.5e-2, 1e-2, 5, 0.6),
                    "mamba": (60, 1.5e-2, 1.2e-2, 5, 0.6),
                    "mamba2": (60, 1.2e-2, 1.2e-2, 5, 0.6),
                    "hybrid": (100, 1.5e-2, 1e-2, 5, 0.6),
                }
            ),
            align={"transfer": 40},
            windows=16,
            learning=Lesson(5, 8),
            batch_size=8,
            corpus=Corpus(500_000, 0, 128, 20),
            held_out=64,
            evaluations=5,
            arms=ALL + MOVED,
        ),
        "images": Numbers(
            model="vit",
            source=Size(2, 32, 2),
            target=Size(3, 48, 3),
            budgets={
                "source": Budget(200, 5e-3, 10),
                "scratch": Budget(300, 5e-3, 15),
                "growth": Budget(300, 5e-3, 30, 0.6),
            },
            learning=Lesson(10, 32, 5e-3),
            batch_size=32,
            held_out=256,
            evaluations=5,
            arms=("lemon", "ligo"),
        ),
    },
)

# Sized for hours on two cores. First the arms that goals are set for.
GROWN_FIRST = ("lemon", "lemon-early", "ligo")
MOVED_FIRST = ("hybrid-early", "retnet-early", "hybrid", "retnet")
FIRST = MOVED_FIRST + GROWN_FIRST
GROWN_THEN = (
    *("mango", "stack", "lemon-carried", "bert2bert", "ligo, tokens dropped", "ligo, layers dropped"),
    *("ligo, in stages", "net2net", "gstack", "msg", "llama-pro", "interpolate", "mslt"),
    *("solar", "staged", "hypercloning", "fine", "gradmax", "upcycle"),
)
MOVED_THEN = (
    *("hybrid, aligned longer", "retnet, aligned longer"),
    *("hybrid, solved", "retnet, solved", "hybrid, unaligned", "retnet, unaligned"),
    *("retnet-learned", "retnet-learned-early", "mamba", "mamba-early", "mamba2", "mamba2-early"),
    *("hybrid-learned", "hybrid-learned-early"),
    *(
        f"{name}, {how}"
        for name in ("retnet-learned", "mamba", "mamba2", "hybrid-learned")
        for how in ("aligned longer", "solved", "unaligned")
    ),
)
LAPTOP = Scale(
    "laptop",
    {
        "text": Numbers(
            model="llama",
            source=Size(4, 256, 8, 768),
            target=Size(8, 384, 12, 1152),
            budgets={
                "source": Budget(600, None, 30),
                "scratch": Budget(900, None, 45),
                **_grown(400),
                "scratch of any": Budget(650, None, 32),
                "transfer": Budget(250, None, 12),
            },
            align={"transfer": 100},
            learning=Lesson(5, 4),
            batch_size=4,
            corpus=Corpus(30_000_000, 4096, 128, 60),
            held_out=96,
            evaluations=12,
            arms=FIRST + MOVED_THEN + GROWN_THEN,
            copied=1.0,
            first=FIRST,
            rates=(1e-3, 2e-3, 4e-3),
            bf16=True,
        ),
        "masked": Numbers(
            model="bert",
            source=Size(4, 128, 4),
            target=Size(8, 256, 8),
            budgets={
                "source": Budget(1500, None, 75),
                "scratch": Budget(2000, None, 100),
                **_grown(1000),
            },
            learning=Lesson(5, 4),
            batch_size=4,
            corpus=Corpus(30_000_000, 4096, 128, 60),
            held_out=96,
            evaluations=12,
            arms=GROWN_FIRST + GROWN_THEN,
            first=GROWN_FIRST,
            rates=(2.5e-4, 5e-4, 1e-3),
            bf16=True,
        ),
        "images": Numbers(
            model="vit",
            source=Size(4, 96, 3),
            target=Size(8, 160, 5),
            budgets={
                "source": Budget(600, None, 30),
                "scratch": Budget(900, None, 45),
                **_grown(480),
            },
            learning=Lesson(5, 32),
            batch_size=32,
            held_out=256,
            evaluations=12,
            # Dropping tokens takes a language model.
            arms=GROWN_FIRST + tuple(name for name in GROWN_THEN if "tokens" not in name),
            first=GROWN_FIRST,
            rates=(2.5e-4, 5e-4, 1e-3),
        ),
    },
    seeds=(0, 1, 2),
    parted=True,
    keep=False,
)

# For one GPU; not run yet.
GPU = replace(
    LAPTOP,
    name="gpu",
    families={
        name: replace(
            numbers,
            source=Size(6, 512, 8, 1536) if name == "text" else Size(6, 384, 6),
            target=Size(12, 768, 12, 2304) if name == "text" else Size(12, 768, 12),
            budgets={arm: _longer(budget, 10) for arm, budget in numbers.budgets.items()},
            align={"transfer": 400},
            learning=Lesson(50, 32),
            batch_size=32,
            corpus=Corpus(200_000_000, 4096, 512, 80, packages=True),
            held_out=512,
            rates=(2e-4, 4e-4, 8e-4),
        )
        for name, numbers in LAPTOP.families.items()
        if numbers.corpus
    },
)
LARGER = {scale.name: scale for scale in (LAPTOP, GPU)}
