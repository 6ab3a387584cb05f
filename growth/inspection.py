"""What a checkpoint is made of, and what growth can do with it."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from growth.adapters import adapter_of
from growth.files import Checkpoint
from growth.plan import Source


def inspect(src: str | Path, out: Console) -> None:
    """Print the spaces, the tensors and the possible operations of the checkpoint in folder `src`."""
    checkpoint = Checkpoint(src)
    config = checkpoint.config
    adapter = adapter_of(config, str(src))
    source = Source(checkpoint, adapter)
    if adapter.describe is not None:
        spaces = Table("space", "units", "entries per unit", "size", title=f"{src}: {adapter.model_type}")
        for name, space in adapter.describe(config, adapter).spaces.items():
            spaces.add_row(name, str(space.units), str(space.width), str(space.size))
        out.print(spaces)
    tensors = Table("tensor", "shape", "weights", title=f"{len(source.on_disk)} tensors")
    for name, (entry, _) in adapter.table(config).items():
        shape = "x".join(map(str, checkpoint.shape(source.on_disk[name])))
        tensors.add_row(source.on_disk[name], shape, ", ".join(weight.name for weight in entry.weights))
    out.print(tensors)
    head = config.hidden_size // config.num_attention_heads
    if adapter.describe is None:
        out.print("can be trained on; it does not grow: grow its source, then transfer the result")
    else:
        out.print(
            f"grow: hidden size {config.hidden_size} to any multiple of the head size {head} above it, "
            f"layers {config.num_hidden_layers} to any number above, ffn size {config.intermediate_size} "
            "to any above"
        )
        out.print("transfer: to retention, Mamba or a pattern of both with attention")
