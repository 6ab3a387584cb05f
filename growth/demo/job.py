"""The demo's job: one small source model, every way to reuse it, and what each way saves.

    text -> source -> grown by every method     -> trained on      against the large model from scratch
                   -> transferred to each LCI   -> trained on      against the same LCI model from scratch

Every arm sees the same windows in the same order as its baseline, for as many steps, at the same peak rate. A
baseline falls along a cosine over all its steps; an arm, which starts ahead, over a part of them (LEMON's
schedule).
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig

import growth
from growth.demo.corpus import byte_tokenizer, corpus
from growth.demo.machine import machine
from growth.demo.page import page
from growth.demo.saving import COSTS, compare, remarks, table
from growth.folders import named_folder, refuse_existing
from growth.loading import quiet
from growth.methods import METHODS
from growth.report import Report
from growth.sizes import Sizes
from growth.training.curve import window_losses
from growth.training.data import Windows, tokens
from growth.training.trainer import TrainReport

PROMPT = "def "


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int


@dataclass(frozen=True)
class Budget:
    """What arms and their baseline get: steps, peak learning rate; the arms' warm-up and the share of decay.

    A baseline warms up over a twentieth of the steps and decays over all of them.
    """

    steps: int
    rate: float
    warmup: int
    decay: float


TRANSFERS = {
    "retnet": {"mixers": "retention"},
    "mamba": {"mixers": "mamba"},
    "hybrid": {"mixers": "retention", "keep_attention": [1]},
}


@dataclass(frozen=True)
class Job:
    """Every number of the demo. Windows are `length` bytes; the loss is measured on `held_out` of them.

    transferring: one budget for each of TRANSFERS; learning: steps of LiGO's maps; text: bytes; words: bytes
    that each model writes.
    """

    source: Size
    target: Size
    training: Budget
    growing: Budget
    transferring: dict[str, Budget]
    learning: int
    batch_size: int
    length: int
    held_out: int
    evaluations: int
    text: int
    words: int
    seed: int = 0
    # A second thread gains a quarter at these sizes; on a busy machine, waiting for it costs ten times that.
    threads: int = 1


FULL = Job(
    source=Size(3, 64, 2),
    target=Size(4, 96, 3),
    training=Budget(350, 8e-3, 0, 1.0),
    growing=Budget(400, 5e-3, 40, 0.43),
    transferring={
        "retnet": Budget(440, 1e-2, 40, 0.8),
        "mamba": Budget(160, 1.2e-2, 40, 0.8),
        "hybrid": Budget(400, 1e-2, 40, 0.6),
    },
    learning=25,
    batch_size=8,
    length=128,
    held_out=128,
    evaluations=8,
    text=4_000_000,
    words=80,
)
QUICK = Job(
    source=Size(2, 32, 2),
    target=Size(3, 48, 3),
    training=Budget(60, 8e-3, 0, 1.0),
    growing=Budget(80, 8e-3, 8, 0.6),
    transferring={
        "retnet": Budget(100, 1e-2, 10, 0.8),
        "mamba": Budget(60, 1.2e-2, 10, 0.8),
        "hybrid": Budget(100, 1e-2, 10, 0.6),
    },
    learning=5,
    batch_size=8,
    length=128,
    held_out=64,
    evaluations=5,
    text=500_000,
    words=20,
)


def run(out: str | Path = "growth-demo", quick: bool = False) -> dict:
    """Do the main job, write checkpoints and report.html into the new folder `out`, print the table.

    Takes about eight minutes on two CPU cores, with `quick` one, on a job too small to mean much. Returns
    what report.json holds. Raises Refusal where `out` exists or Python comes without its sources.
    """
    return perform(QUICK if quick else FULL, named_folder(out, "output folder"), Console())


def perform(job: Job, out: Path, console: Console) -> dict:
    """The job with the numbers of `job`. `out` is removed if it does not come to its end."""
    refuse_existing(out)
    began, threads = time.perf_counter(), torch.get_num_threads()
    out.mkdir(parents=True)
    torch.set_num_threads(job.threads)
    try:
        report = _Demo(job, out, console).report()
        report["seconds"] = time.perf_counter() - began
        (out / "report.json").write_text(json.dumps(report, indent=1))
        (out / "report.html").write_text(page(report), encoding="utf-8")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    console.print(table(report))
    for line in [
        *remarks(report),
        f"{out / 'report.html'} shows the curves. {report['seconds']:.0f} s in all.",
    ]:
        console.print(line, highlight=False, soft_wrap=True)
    return report


class _Demo:
    """The text, the models and the arms of one job; everything is written below `out`."""

    def __init__(self, job: Job, out: Path, console: Console):
        self.job, self.out, self.console = job, out, console
        self.tokenizer = byte_tokenizer()
        train, validation = corpus(job.text)
        self.text = {
            "what": "Python's standard library",
            "files": (len(train), len(validation)),
            "bytes": tuple(sum(len(text.encode()) for text in texts) for texts in (train, validation)),
        }
        (out / "text").mkdir()
        for name, texts in (("train", train), ("validation", validation)):
            (out / "text" / f"{name}.txt").write_text("".join(texts), encoding="utf-8")
        self.windows = Windows(tokens(train, self.tokenizer), job.length)
        self.held_out = Windows(tokens(validation, self.tokenizer), job.length).sample(job.held_out)
        self.losses: dict[str, Tensor] = {}  # of every held-out window, at the end of every arm

    def report(self) -> dict:
        job = self.job
        source = self.scratch("source", self.neox(job.source), job.training)
        arms = [self.scratch("scratch", self.neox(job.target), job.growing)]
        for method in ("lemon", *(name for name in METHODS if name != "lemon")):
            arms.append(self.grown(method, arms[0]))
            self.say(arms[-1])
        for name, settings in TRANSFERS.items():
            start, budget = self.out / "start" / name, job.transferring[name]
            made = growth.transfer(self.trained("source"), start, seed=job.seed, **settings)
            arms.append(self.scratch(f"{name}-scratch", AutoConfig.from_pretrained(start), budget))
            arms.append(self.arm(name, made, arms[-1], budget, freeze="transferred", unfreeze="plateau"))
            self.say(arms[-1])
        return {
            "job": asdict(job),
            "corpus": self.text,
            "machine": machine(),
            "source": source,
            "arms": arms,
        }

    def neox(self, size: Size) -> GPTNeoXConfig:
        """A GPT-NeoX of bytes. Rotary positions on whole heads and weights of about 1 / sqrt(width): the
        usual quarter and 0.02 end a fifth of a nat higher at these widths."""
        return GPTNeoXConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.hidden,
            max_position_embeddings=self.job.length,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )

    def trained(self, name: str) -> Path:
        return self.out / "trained" / name

    def scratch(self, name: str, config: PreTrainedConfig, budget: Budget) -> dict:
        """A baseline: a fresh model of that configuration, trained."""
        torch.manual_seed(self.job.seed)
        start = self.out / "start" / name
        with quiet():
            AutoModelForCausalLM.from_config(config).save_pretrained(start)
        self.tokenizer.save_pretrained(start)
        report = self.train(name, budget, schedule="cosine", warmup=budget.steps // 20)
        return self.record(name, report, baseline=None, start={"flops": 0, "seconds": 0.0})

    def grown(self, method: str, baseline: dict) -> dict:
        kind = METHODS[method]
        learned = {"data": self.windows, "steps": self.job.learning} if kind.learned else {}
        made = growth.grow(
            self.trained("source"),
            self.out / "start" / method,
            Sizes(hidden=self.job.target.hidden, layers=self.job.target.layers),
            kind(**learned),
            seed=self.job.seed,
        )
        return self.arm(method, made, baseline, self.job.growing)

    def arm(self, name: str, made: Report, baseline: dict, budget: Budget, **freezing) -> dict:
        report = self.train(
            name, budget, schedule="lemon", warmup=budget.warmup, decay=budget.decay, **freezing
        )
        start = {"flops": made.flops, "seconds": made.seconds}
        arm = self.record(name, report, baseline["name"], start) | {"lossless": made.lossless}
        apart = self.losses[name] - self.losses[baseline["name"]]
        return arm | {"noise": apart.std().item() / len(apart) ** 0.5} | compare(arm, baseline)

    def train(self, name: str, budget: Budget, **settings) -> TrainReport:
        job = self.job
        return growth.train(
            self.out / "start" / name,
            self.windows,
            self.trained(name),
            steps=budget.steps,
            batch_size=job.batch_size,
            sequence_length=job.length,
            learning_rate=budget.rate,
            validation=self.held_out,
            eval_every=math.ceil(budget.steps / job.evaluations),
            save_every=0,
            seed=job.seed,
            **settings,
        )

    def record(self, name: str, report: TrainReport, baseline: str | None, start: dict) -> dict:
        """What the report says of a trained model; the model writes a few words, too."""
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(report.out)
        self.losses[name] = window_losses(model, self.held_out.windows)
        prompt = self.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(self.job.seed)
        text = model.generate(**prompt, max_new_tokens=self.job.words, do_sample=True, temperature=0.7)
        return {
            "name": name,
            "baseline": baseline,
            "start": start,
            "checkpoint": str(report.out.relative_to(self.out)),
            "parameters": report.parameters,
            "step_flops": report.step_flops,
            "unfrozen_at": report.unfrozen_at,
            "curve": [asdict(point) for point in report.curve],
            "sample": self.tokenizer.decode(text[0]),
        }

    def say(self, arm: dict) -> None:
        """The arm's result, as soon as it is known."""
        result = "the from-scratch loss was not reached"
        if arm["saved"]:
            flops, seconds = (f"{arm['saved'][cost]:.0%}" for cost in COSTS)
            result = f"the from-scratch loss with {flops} of its FLOPs and {seconds} of its time saved"
        self.console.print(f"{arm['name']}: {result}", highlight=False, soft_wrap=True)
