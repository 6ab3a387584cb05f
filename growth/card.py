"""README.md of a checkpoint, the model card: its origin, what `check` measured, how to load it."""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from growth.errors import several
from growth.families import auto_of
from growth.jsonfile import rewrite_text
from growth.record import begun

CARD = "README.md"
BEGIN, END = "<!-- growth check -->", "<!-- growth check ends -->"
LOAD = """```python
{first}from transformers import {auto}

model = {auto}.from_pretrained({name}{trust})
```
"""
FIRST = {"retnet": "import fla\n"}  # what makes a type known to transformers
# Of a type of model: what its layers need, and who serves it.
NEEDS = {
    "lci": """
`pip install lcikernels[growth]` has its layers. `trust_remote_code` is for the few lines in this folder that
import them; after `import lcikernels.models` it is not needed.
""",
    "granitemoehybrid": """
The class is transformers' own, so nothing else is needed. vLLM and SGLang have it too: `vllm serve FOLDER`,
or `python -m sglang.launch_server --model-path FOLDER`.
""",
    "retnet": """
`pip install flash-linear-attention` has its layers, whose kernels run on GPUs. Its release 0.6.0 loses the
cache under transformers 5.24 and then generates from the last token alone, so `use_cache` is off here: pass
`generate(use_cache=True)` where that gives the same text, for a state that does not grow.
""",
}


def write_card(
    folder: Path,
    name: str,
    source: Path,
    config: PreTrainedConfig,
    facts: Sequence[str],
    outlook: str,
    figures: str,
) -> None:
    """Write the card of the checkpoint in `folder`, to be called `name`, which was made of that in `source`.

    facts: a line each on how it came to be; outlook: what to expect of it; figures: what was measured.
    """
    base, kind, auto = base_model(source), config.model_type, auto_of(config).__name__
    trust = ", trust_remote_code=True" if kind == "lci" else ""
    load = LOAD.format(first=FIRST.get(kind, ""), auto=auto, name=json.dumps(name), trust=trust)
    head = f"base_model: {json.dumps(base)}\n{licence(source)}library_name: transformers\ntags:\n- growth\n"
    listed = "\n".join(f"* {fact}" for fact in (f"base model: {base}", *facts))
    (folder / CARD).write_text(
        f"---\n{head}---\n\n# {name}\n\n{listed}\n\n{outlook}\n\n"
        f"{BEGIN}\n{figures}\n{END}\n\n"
        f"## Loading\n\n{load}{NEEDS.get(kind, '')}",
        encoding="utf-8",
    )


def told(record: dict) -> tuple[list[str], str, str]:
    """What growth.json tells of how a checkpoint came to be, what it promises, and how to measure that."""
    old, new = record["parameters"]
    facts = [f"made by {_made_by(record)}: {old:,} -> {new:,} parameters", *_sizes(record)]
    if record.get("optimizer"):
        facts.append(
            f"with its source's optimizer state, {record['policy']}: `growth train FOLDER --resume` goes on "
            "from it, as does a Trainer's `resume_from_checkpoint`"
        )
    facts += [f"before that, {_made_by(before)}" for before in reversed(record["lineage"])]
    facts.append("settings, and where every tensor comes from: growth.json")
    outlook = "It computes the base model's logits, to rounding."
    if not record["lossless"]:
        why = f" ({several(lost)})" if (lost := record.get("lost")) else ""
        outlook = f"Its logits are not the base model's{why}: train it on."
    if record.get("closed"):
        outlook += (
            " `growth train`, or `OpenMasks` in another Trainer, closes masks over what is new and begins as "
            "the base model; loaded, it is open."
        )
    how = f"`growth check {record['source']} FOLDER` does"
    if record.get("format") == "fla":  # no type that the command line knows
        how = f'`growth.check("{record["source"]}", FOLDER)` does in Python, after `import fla`, on a GPU'
    if begun(Path(record["source"])):
        how = "a step `check: {}` behind it in its recipe does"
    figures = f"Not measured yet: {how}, and writes it here."
    return [*facts, *record.get("notes", ())], outlook, figures


def _made_by(record: dict) -> str:
    """A verb, and how it did it."""
    how = {"shrink": "by score", "train": "schedule"}.get(record["verb"], "method")
    return f"`growth {record['verb']}`, {how} {record['method']}"


def _sizes(record: dict) -> list[str]:
    """A fact on the sizes that differ."""
    old, new = record.get("from"), record.get("to")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    pairs = ((name.replace("_", "-"), old.get(name) or 0, size or 0) for name, size in new.items())
    found = ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)
    return [f"sizes: {found}"] if found else []


def write_figures(folder: Path, figures: str) -> None:
    """Put what `check` measured into the card, where growth wrote one and it may be written."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if not os.path.isfile(folder / CARD):
            return
        card = (folder / CARD).read_text(encoding="utf-8")
        head, begin, rest = card.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if begin and end:
            rewrite_text(folder / CARD, f"{head}{BEGIN}\n{figures}.\n{END}{tail}")


def title(dst: Path) -> str:
    """The name of a result; of a recipe's step, the recipe's."""
    return begun(dst).get("output", dst.absolute().name)


def base_model(source: Path) -> str:
    """The Hub's name of a folder in its cache, else the folder's name; of a recipe's step, its source's."""
    path = os.path.abspath(begun(source).get("source", source))
    found = re.search(r"models--([\w.-]+)/snapshots/", f"{path}/")
    return found[1].replace("--", "/", 1) if found else os.path.basename(path)


def licence(source: Path) -> str:
    """The lines on the licence in the head of the source's own card, "" where there are none."""
    if not os.path.isfile(source / CARD):
        return ""
    try:
        with (source / CARD).open(encoding="utf-8", errors="replace") as file:
            head = re.match(r"---\n(.*?\n)---\n", file.read(1 << 20), re.S)
    except OSError:
        return ""
    return "".join(re.findall(r"^license\w*:.*\n(?:[ \t-].*\n)*", head[1], re.M)) if head else ""
