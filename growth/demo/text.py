"""The demo's language models: grown by every method, transferred to every LCI."""

from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

import growth
from growth.demo.arms import Arms
from growth.demo.budgets import Size, Text
from growth.demo.corpus import byte_tokenizer, corpus
from growth.methods import METHODS
from growth.training.corpus import tokens
from growth.training.data import Windows
from growth.transferring.align import Alignment

PROMPT = "def "


class Texts(Arms):
    """GPT-NeoX of the bytes of Python's standard library."""

    auto = AutoModelForCausalLM
    unit = "nats a byte"

    def __init__(self, numbers: Text, out: Path, console: Console, seed: int, tuning: bool = False):
        """tuning: measure on as many windows that the demo does not, to choose settings by."""
        self.tokenizer = byte_tokenizer()
        train, validation = corpus(numbers.text)
        self.corpus = {
            "what": "Python's standard library",
            "files": (len(train), len(validation)),
            "bytes": tuple(sum(len(text.encode()) for text in texts) for texts in (train, validation)),
        }
        (out / "text").mkdir()
        for name, texts in (("train", train), ("validation", validation)):
            (out / "text" / f"{name}.txt").write_text("".join(texts), encoding="utf-8")
        windows, held_out = (
            Windows(tokens(texts, self.tokenizer), numbers.length) for texts in (train, validation)
        )
        others, measured = held_out.hold_out(numbers.held_out)
        measured = others.sample(numbers.held_out) if tuning else measured
        super().__init__(numbers, out, console, seed, windows, measured)

    def report(self) -> dict:
        numbers, source = self.numbers, self.source()
        left_out = self.left_out("source")
        methods = ("lemon", *(name for name in METHODS if name != "lemon" and name not in left_out))
        baseline = self.scratch("scratch", self.neox(numbers.target), numbers.growing)
        arms = [baseline, *self.grown("source", methods, baseline)]
        arms += [self.carried(name, baseline) for name in numbers.carrying]
        for name in numbers.transferring:
            arms += self.transferred(name)
        return {
            "name": "text",
            "unit": self.unit,
            "corpus": self.corpus,
            "source": source,
            "arms": arms,
            "left_out": left_out,
        }

    def source(self) -> dict:
        """The model that all arms start from, but for those of a rate that has not fallen."""
        return self.scratch(
            "source", self.neox(self.numbers.source), self.numbers.training, keep_optimizer=True
        )

    def carried(self, name: str, baseline: dict) -> dict:
        """A source grown with its optimizer's state, with which the arm goes on."""
        arm, source = self.numbers.carrying[name], "source"
        if not arm.annealed:
            source = f"{name}-source"
            config, budget = self.neox(self.numbers.source), self.numbers.training
            made = self.scratch(source, config, budget, schedule="constant")
        grown = self.grow(source, "lemon", self.start(name), carries=True, noise=arm.noise)
        found = self.arm(name, grown, baseline, arm.budget, resume=True)
        return found if arm.annealed else found | {"source": made}

    def transferred(self, name: str) -> tuple[dict, dict]:
        """A baseline, and the source transferred to a model of its kind."""
        arm = self.numbers.transferring[name]
        batch = self.numbers.batch_size
        align = Alignment(arm.align, arm.windows // batch, batch, step_size=1)
        made = growth.transfer(
            self.trained("source"),
            self.start(name),
            align=align,
            data=self.examples,
            seed=self.seed,
            **arm.settings,
        )
        config = AutoConfig.from_pretrained(self.start(name))
        baseline = self.scratch(f"{name}-scratch", config, arm.budget)
        return baseline, self.arm(name, made, baseline, arm.budget, copied_rate=arm.copied)

    def neox(self, size: Size) -> GPTNeoXConfig:
        """A GPT-NeoX of bytes. Rotary positions on whole heads and weights of about 1 / sqrt(width): the
        usual quarter and 0.02 end a fifth of a nat higher at these widths."""
        return GPTNeoXConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.hidden,
            max_position_embeddings=self.numbers.length,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )

    def beside(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def told(self, model: PreTrainedModel) -> dict:
        """A few words that it writes."""
        prompt = self.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(self.seed)
        text = model.generate(**prompt, max_new_tokens=self.numbers.words, do_sample=True, temperature=0.7)
        return {"sample": self.tokenizer.decode(text[0])}
