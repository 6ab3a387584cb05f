"""What a checkpoint is made of, and what growth can do with it."""

from collections.abc import Iterator
from pathlib import Path

from growth.checkpoint import Checkpoint
from growth.plan import Source
from growth.transferring.xatl import SOURCES


def inspect(src: str | Path) -> Iterator[str]:
    """Lines on the spaces, tensors and possible operations of the checkpoint `src`, a folder or the Hub's."""
    checkpoint = Checkpoint(src)
    config = checkpoint.config
    adapter = adapter_of(config, str(src))
    source = Source(checkpoint, adapter)
    yield f"{src}: {adapter.model_type}, {config.num_hidden_layers} layers, {len(source.on_disk)} tensors"
    wide = max(map(len, source.on_disk.values()))
    for name, (entry, _) in adapter.table(config).items():
        shape = "x".join(map(str, checkpoint.shape(source.on_disk[name])))
        weights = ", ".join(weight.name for weight in entry.weights)
        yield f"{source.on_disk[name]:{wide}}  {shape:12} {weights}"
    if adapter.describe is None:
        yield "it can be trained; to grow it, grow the model that it was transferred from, then transfer that"
        return
    model = adapter.describe(config, adapter)
    for name, space in model.spaces.items():
        each = f" of {space.width}" if space.width > 1 else ""
        yield f"space {name:12} {space.units}{each}"
    D, head, ffn = model.spaces["residual"].size, model.spaces["query.{}"].width, model.spaces["ffn.{}"].size
    lossless = f" (lossless: of {D} itself)" if model.post_norm else ""
    yield (
        f"grow: hidden size {D} to any multiple of the head size {head} above it{lossless}, "
        f"layers {model.layers} and ffn size {ffn} to any number above"
    )
    if adapter.model_type in SOURCES:
        yield "transfer: to retention, Mamba, or a pattern of both with attention"
