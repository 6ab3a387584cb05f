"""A step of LiGO's learning beside a step of training the large model.

    PYTHONPATH=.:tests python -m benchmarks.ligo_step [--tokens 8192]

prints what both take where nothing is computed: memory (weights, gradients, Adam's moments and what forward
and backward hold at most, in float32, less what kronecker_expand holds inside) and operations of matrix
products; and the share of LiGO's that makes the large weights, forward, once more in the backward, and their
gradients.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from memory import Memory
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPT2Config, masking_utils

from benchmarks.measure import flops
from growth.checkpoint import Checkpoint
from growth.learned.expansion import Expansion
from growth.loading import quiet
from growth.methods import Ligo
from growth.plan import Source
from growth.sizes import Sizes, resized
from growth.training.flops import CPU_ATTENTION

LENGTH = 512
BERT = BertConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048)
PAIRS = {  # of a config the growth to so many channels and layers, and how it starts
    "BERT-Small to Base": (BERT, (768, 12), "net2net"),  # 768 is no multiple of 512
    "GPT2-Base to Medium": (GPT2Config(), (1024, 24), "lossless"),
}


def models(pair: str, device: str) -> tuple[Expansion, nn.Module]:
    """What LiGO trains, and the large model; weights are random."""
    small, (hidden_size, num_layers), start = PAIRS[pair]
    auto, method = (AutoModelForMaskedLM if small is BERT else AutoModelForCausalLM), Ligo(start=start)
    with tempfile.TemporaryDirectory() as folder, quiet():
        auto.from_config(small).save_pretrained(folder)
        source = Source(Checkpoint(Path(folder)))
        config = resized(source.model, Sizes(hidden_size, num_layers), method.layers)
        target = source.family.model(config, source.model.parts)
        old, new = source.model.architecture, target.architecture
        operator = method.operator(source, old, new, method.maps(old, new), seed=0)
        expansion = Expansion(operator, source, target).to(device)
    with torch.device(device):
        large = auto.from_config(config).train()
    large.config.use_cache = False
    return expansion, large


def tokens(count: int, device: str) -> Tensor:
    return torch.randint(30000, (count // LENGTH, LENGTH), device=device)


def step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """A training step with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def expand(expansion: Expansion) -> Callable[[], None]:
    """What of a step is spent on the large weights: made, made again, and differentiated."""
    operator = expansion.operator
    layers = range(max(layer for _, layer in expansion.table.values() if layer is not None) + 1)

    def run() -> None:
        for layer in layers:
            weights = [x for entry, i in expansion.table.values() if i == layer for x in entry.weights]
            with torch.no_grad():
                made = operator.wide(weights, layer)
            cotangents = list(map(torch.ones_like, made))
            torch.autograd.backward(operator.wide(weights, layer), cotangents)
        expansion.zero_grad()

    return run


def counted(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    """Bytes and operations of a step; one after the other, for the counter keeps what a checkpoint frees."""
    with Memory({*model.parameters(), *model.buffers()}) as memory:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    moments = sum(2 * 4 * x.numel() for x in model.parameters() if x.requires_grad)
    operations = flops(lambda: model(input_ids=ids, labels=ids).loss.backward(), custom_mapping=CPU_ATTENTION)
    return memory.most + moments, operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    print("| | tokens | GB | training's | ratio | Tflop | training's | of LiGO's operations the expansion |")
    print("|---|---|---|---|---|---|---|---|")
    # It reads positions, which are nowhere.
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None):
        for pair in PAIRS:
            expansion, large = models(pair, "meta")
            ids = tokens(options.tokens, "meta")
            (ours, count), (theirs, their_count) = counted(expansion, ids), counted(large, ids)
            sizes = f"{options.tokens} | {ours / 1e9:.2f} | {theirs / 1e9:.2f} | {ours / theirs:.2f}"
            share = flops(expand(expansion)) / count
            print(f"| {pair} | {sizes} | {count / 1e12:.2f} | {their_count / 1e12:.2f} | {share:.1%} |")


if __name__ == "__main__":
    main()
