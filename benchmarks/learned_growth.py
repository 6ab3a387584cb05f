"""Does LiGO learn to grow? The validation loss right after growth, on three families and three seeds:

    python -m benchmarks.learned_growth [--steps 100] [--seeds 3] [--family BERT]

A small GPT-NeoX, GPT-2 and BERT are trained on Python's standard library for 400 steps, then grown by
StackBERT, Net2Net and LiGO, which learns on the same text: 16 windows a step, for BERT 32, since 15 % of its
tokens are a lesson. BERT grows by a whole factor, as a lossless start of a post-norm model needs.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedConfig,
)

import growth
from growth.checkpoint import Checkpoint
from growth.demo.corpus import byte_tokenizer, corpus
from growth.loading import load_model, quiet
from growth.methods import Ligo, Net2Net, StackBert
from growth.plan import Source
from growth.sizes import Sizes
from growth.training.corpus import tokens
from growth.training.curve import evaluate
from growth.training.data import Windows, collator

LENGTH, BATCH, PRETRAINING = 128, 16, 400
RATE = 5e-3  # of many steps
SMALL = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
SMALL |= {"max_position_embeddings": LENGTH}
FAMILIES = {
    "GPT-NeoX": (GPTNeoXConfig(vocab_size=257, intermediate_size=384, **SMALL), 160, 16),
    "GPT-2": (GPT2Config(vocab_size=257, bos_token_id=0, eos_token_id=0, **SMALL), 160, 16),
    "BERT": (BertConfig(vocab_size=257, intermediate_size=384, **SMALL), 192, 32),
}
METHODS = {
    "StackBERT": StackBert(),
    "Net2Net": Net2Net(),
    "LiGO": Ligo(),
    "LiGO, published start": Ligo(start="published"),
}


def pretrain(folder: Path, config: PreTrainedConfig, data: Windows, seed: int) -> Path:
    """A small model trained on the corpus, saved with its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": AddedToken("[MASK]", special=True)})
    tokenizer.save_pretrained(folder)
    auto = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with quiet():
        model.save_pretrained(folder)  # the collator asks its configuration
    batch_of = collator(auto, folder) or torch.utils.data.default_collate
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, PRETRAINING)
    for _ in range(PRETRAINING):
        batch = batch_of([data[i] for i in torch.randint(len(data), (BATCH,)).tolist()])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    with quiet():
        model.save_pretrained(folder)
    return folder


def loss(folder: Path, windows: Tensor) -> float:
    """On held-out windows, for a masked model with the same masks each time."""
    masked = collator(Source(Checkpoint(folder)).model.auto, folder)
    batch = masked([{"input_ids": x} for x in windows], seed=0) if masked else {"input_ids": windows}
    return evaluate(load_model(folder), *batch.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--family", choices=FAMILIES, help="one of them")
    options = parser.parse_args()
    texts = [tokens(part, byte_tokenizer()) for part in corpus(2_000_000)]
    data, held_out = (Windows(part, LENGTH) for part in texts)
    print("| family | seed | source | " + " | ".join(METHODS) + " |")
    print("|---|---|" + "---|" * (len(METHODS) + 1))
    for family in [options.family] if options.family else FAMILIES:
        config, width, batch_size = FAMILIES[family]
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as scratch:
                source = pretrain(Path(scratch, "source"), config, data, seed)
                found = [loss(source, held_out.sample(128).windows)]
                for i, method in enumerate(METHODS.values()):
                    grown = Path(scratch, f"{i}")
                    if method.learned:
                        how = {"data": data, "steps": options.steps, "batch_size": batch_size}
                        method = replace(method, learning_rate=RATE, **how)
                    growth.grow(source, grown, Sizes(hidden=width, layers=6), method, seed=seed)
                    found.append(loss(grown, held_out.sample(128).windows))
            print(f"| {family} | {seed} | " + " | ".join(f"{x:.3f}" for x in found) + " |", flush=True)


if __name__ == "__main__":
    main()
