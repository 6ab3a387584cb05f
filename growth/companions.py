"""What travels with the weights: tokenizer, generation, images' numbers, sentences' vectors."""

import json
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from transformers import GenerationConfig

from growth.architecture import Architecture
from growth.errors import reason, refuse
from growth.folders import refuse_outside
from growth.jsonfile import read_list, read_object

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Read wherever they are, as objects.
OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
GENERATION = "generation_config.json"
BESIDE = ("preprocessor_config.json", "processor_config.json")  # how images become numbers
MODULES = "modules.json"  # of sentence-transformers: what follows the model, a folder each
SENTENCE = ("sentence_bert_config.json", "config_sentence_transformers.json")
POOLING = "config.json"  # of a pooling module
POOLED = ("word_embedding_dimension", "embedding_dimension")  # the model's width, by its older and newer name
WEIGHTS = ("safetensors", "bin")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in `folder`; a refusal where one of them is no file that can be read."""
    found = [file for name in TOKENIZER for file in sorted(folder.glob(name))]
    # glob passes over a dangling link where the pattern is a plain name.
    found += [link for name in TOKENIZER if (link := folder / name).is_symlink() and link not in found]
    for file in found:
        _refuse_unreadable(file, "the tokenizer")
    return found


def refuse_broken_companions(src: Path) -> None:
    """Raises Refusal where `copy_companions` would, or a file that any tokenizer is read from is no JSON;
    found before any work."""
    refuse_odd_generation(src)
    modules = sentence_modules(src, (0, 0))
    for file in _files(src, modules):
        if file.name in OBJECTS:
            read_object(file)
    for folder, kind in modules.items():
        if kind == "Pooling":
            read_object(folder / POOLING)


def refuse_other_companions(src: Path, old: Architecture, new: Architecture) -> None:
    """Raises Refusal where what lies beside the source would not fit the target; found before any work."""
    sentence_modules(src, tuple(model.wires["residual"].size for model in (old, new)))


def copy_companions(src: Path, dst: Path, widths: tuple[int, int] = (0, 0)) -> None:
    """Copy what belongs to the tokenizer, to generation and to sentences' vectors; all else stays in `src`.

    widths: the hidden sizes of the model in `src` and of that in `dst`. A pooling module learns of the new
    one. Raises Refusal where a module's own weights do not fit it.
    """
    refuse_odd_generation(src)
    modules = sentence_modules(src, widths)
    for folder in modules:
        (dst / folder.name).mkdir()  # of some it is all there is
    for file in _files(src, modules):
        target = dst / file.relative_to(src)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)  # not its mode: permissions follow the umask
    for folder, kind in modules.items():
        if kind == "Pooling":
            _widen(dst / folder.name / POOLING, widths)


def _files(src: Path, modules: Iterable[Path]) -> list[Path]:
    """What lies beside the weights, and in the folders of modules, and is copied. Raises Refusal where one
    cannot be read, or leads out."""
    named = (GENERATION, *BESIDE, MODULES, *SENTENCE)
    files = [file for name in named if (file := src / name).exists()]
    for folder in modules:
        files += [file for file in sorted(folder.rglob("*")) if not file.is_dir()]
    for file in files:
        _refuse_unreadable(file, "the model")
    files = tokenizer_files(src) + files
    refuse_outside(src, *files)
    return files


def sentence_modules(folder: Path, widths: tuple[int, int]) -> dict[Path, str]:
    """The folders of what sentence-transformers puts behind the model, and their kinds; {} where it is none.

    Raises Refusal where one has weights, which are made for a width that is no longer the model's.
    """
    if not (file := folder / MODULES).exists():
        return {}
    found = {}
    for module in read_list(file, "path", "type"):
        name, kind = str(module["path"]), str(module["type"]).rpartition(".")[2]
        if name == ".." or Path(name).name != name:
            raise refuse(str(file), "modules in folders beside it", repr(name), "save the model again")
        if name and (folder / name).is_dir():
            found[folder / name] = kind
    old, new = widths
    for module, kind in found.items():
        weights = [file for ending in WEIGHTS for file in module.glob(f"*.{ending}")]
        if weights and old != new:
            raise refuse(
                str(module),
                f"no weights for a hidden size of {old}, which becomes {new}",
                f"{weights[0].name} of its {kind} module",
                f"grow the layers alone, or take the module out of {MODULES} and train a new one",
            )
    return found


def generate_without_cache(folder: Path) -> None:
    """Tell generation in `folder` what the configuration there says, over which it goes."""
    if (file := folder / GENERATION).exists():
        file.write_text(json.dumps(read_object(file) | {"use_cache": False}, indent=2))


def _widen(file: Path, widths: tuple[int, int]) -> None:
    """Tell a pooling module's configuration the model's new width, where it had the old one."""
    config = read_object(file)
    changed = {name: widths[1] for name in POOLED if config.get(name) == widths[0]}
    file.write_text(json.dumps(config | changed, indent=4))


def refuse_odd_generation(folder: Path) -> None:
    """Raises Refusal where generation_config.json, if there is one, is not what transformers reads."""
    if (file := folder / GENERATION).exists():
        settings = read_object(file)
        try:
            GenerationConfig(**settings)
        except (TypeError, ValueError, AttributeError) as error:
            raise refuse(
                str(file), "settings that transformers knows", reason(error), "mend the file, or remove it"
            ) from error


def _refuse_unreadable(file: Path, what: str) -> None:
    why = ""
    try:
        if stat.S_ISREG(file.stat().st_mode):
            file.open("rb").close()
        else:
            why = "a folder, a pipe or a device"
    except OSError as error:
        why = error.strerror
    if why:
        raise refuse(str(file), f"a file of {what}", why, "copy it there again, or remove it")
