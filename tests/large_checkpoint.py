"""A Llama, or a GPT-NeoX, of any size on disk, of random weights, made in little memory:

    python tests/large_checkpoint.py OUT [--gigabytes 6] [--family gpt_neox]

writes OUT as transformers does, in bfloat16 and shards of at most 2 GB. Heads have 128 dims, three of Llama's
queries share a key and a value; as many layers as the size asks for.
"""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

BLOCK = 2**22  # of the normal numbers that all weights are taken from
SHARD_BYTES = 2 * 10**9


def llama(layers: int, hidden_size: int, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=hidden_size // 384,
        head_dim=128,
        intermediate_size=hidden_size * 8 // 3,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def gpt_neox(layers: int, hidden_size: int, vocab_size: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        intermediate_size=hidden_size * 4,
        architectures=["GPTNeoXForCausalLM"],
        dtype="bfloat16",
    )


FAMILIES = {"llama": llama, "gpt_neox": gpt_neox}


def sized(
    gigabytes: float, hidden_size: int = 3072, vocab_size: int = 128256, family: str = "llama"
) -> PreTrainedConfig:
    """The model of about so many bytes in bfloat16, of one layer at least; hidden_size a multiple of 384."""
    if hidden_size % 384:
        raise ValueError(f"hidden_size must be a multiple of 384, got {hidden_size}")

    def config(layers: int) -> PreTrainedConfig:
        return FAMILIES[family](layers, hidden_size, vocab_size)

    one, two = (sum(shape.numel() for shape in shapes(config(n)).values()) for n in (1, 2))
    return config(max(1, 1 + round((gigabytes * 1e9 / 2 - one) / (two - one))))


def shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: x.shape for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()}


def spread(name: str) -> tuple[float, float]:
    """Mean and standard deviation of a tensor."""
    return (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.02)


def weights(name: str, shape: torch.Size, normal: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """A tensor in pieces, each from a place of its own among the normal numbers: gains about 1, the rest
    about 0."""
    mean, std = spread(name)
    for start in range(0, shape.numel(), BLOCK):
        size = min(BLOCK, shape.numel() - start)
        offset = int(torch.randint(BLOCK, (), generator=generator))
        scale = std * (0.75 + 0.5 * float(torch.rand((), generator=generator)))
        yield normal[offset : offset + size].mul(scale).add_(mean).bfloat16()


def shards(tensors: dict[str, torch.Size], shard_bytes: int) -> list[list[str]]:
    """The names, in order, of as many tensors at a time as fit; one that fits nowhere is alone."""
    groups, room = [], 0
    for name, shape in tensors.items():
        size = 2 * shape.numel()
        if size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    return groups


def header(names: list[str], tensors: dict[str, torch.Size]) -> bytes:
    """A safetensors file up to its first number."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + 2 * tensors[name].numel()
        entries[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(
    folder: str | Path, config: PreTrainedConfig, shard_bytes: int = SHARD_BYTES, seed: int = 0
) -> Path:
    """A checkpoint of random weights in a new folder; memory holds 130 MB meanwhile."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2 * BLOCK, generator=generator)
    tensors, where = shapes(config), {}
    groups = shards(tensors, shard_bytes)
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        with open(folder / file, "wb") as out:
            out.write(header(names, tensors))
            for name in names:
                for piece in weights(name, tensors[name], normal, generator):
                    out.write(piece.view(torch.uint8).numpy())
    total = sum(2 * shape.numel() for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--hidden-size", type=int, default=3072)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    options = parser.parse_args()
    config = sized(options.gigabytes, options.hidden_size, options.vocab_size, options.family)
    write(options.out, config)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {config.num_hidden_layers} layers of {config.hidden_size}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
