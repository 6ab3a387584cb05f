"""What travels with the weights: the tokenizer, whole, and how the model generates."""

import shutil
import stat
from pathlib import Path

from transformers import GenerationConfig

from growth.errors import reason, refuse
from growth.jsonfile import read_object

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
GENERATION = "generation_config.json"


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in `folder`; a refusal where one of them is no file that can be read."""
    found = [file for name in TOKENIZER for file in sorted(folder.glob(name))]
    # glob passes over a dangling link where the pattern is a plain name.
    found += [link for name in TOKENIZER if (link := folder / name).is_symlink() and link not in found]
    for file in found:
        _refuse_unreadable(file)
    return found


def copy_companions(src: Path, dst: Path) -> None:
    """Copy what belongs to a tokenizer and to generation; whatever else lies in `src` stays there."""
    files = tokenizer_files(src)
    if (generation := src / GENERATION).exists():
        refuse_odd_generation(src)
        files.append(generation)
    for file in files:
        target = dst / file.relative_to(src)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)  # not its mode: permissions follow the umask


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


def _refuse_unreadable(file: Path) -> None:
    why = ""
    try:
        if stat.S_ISREG(file.stat().st_mode):
            file.open("rb").close()
        else:
            why = "a folder, a pipe or a device"
    except OSError as error:
        why = error.strerror
    if why:
        raise refuse(str(file), "a file of the tokenizer", why, "copy it there again, or remove it")
