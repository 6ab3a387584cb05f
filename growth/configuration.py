"""config.json that somebody else wrote: looked at before transformers makes a model's configuration of it."""

import contextlib
import difflib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging as theirs

from growth.errors import Refusal, reason, refuse
from growth.jsonfile import read_object

CONFIG = "config.json"
LARGEST = 2**24  # of one size: a matrix of a thousand times that many entries is beyond any machine
LABELS = 2**20  # classes, for each of which transformers makes up a name
SIZES = """hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size
    max_position_embeddings n_inner type_vocab_size""".split()
# What loops run to and tensors are made of, whatever a family calls it.
COUNTED = re.compile(
    r"(?!\w*param)((num|n|d)_\w+|\w*(size|sizes|dim|dims|rank|layers|heads|experts|embeddings|positions))"
)
LAYERS = re.compile(r"(num|n)_\w*layers?|(en|de)coder_layers")
QUANTIZED = ("quantization_config", "compression_config")
ELSEWHERE = {"retnet": "fla"}  # types of models -> the packages that make them known to transformers
STEADY = ("norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "initializer_range")
ATTENTION = (None, "eager", "sdpa")  # what is in torch; of other names the Hub may have code
BELONGS = "check that it belongs to these weights"
MEND = "mend the file; Python code that comes with a checkpoint is not run"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines and no bars of transformers inside; the caller's settings after."""
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration in the folder `path`: of a class of transformers, or of one registered there.

    Raises Refusal where it is none that such a class takes, where a size is beyond any machine, before
    anything is made of that size, and where it names another file than the weights beside it.
    """
    import lcikernels.models  # noqa: F401  - registers its configuration with AutoConfig

    file = path / CONFIG
    if not os.path.isfile(file):  # false, too, where a name is too long or a link leads to itself
        raise _no_checkpoint(path)
    found = read_object(file)
    _refuse_unknown(file, found.get("model_type"))
    for where, fields in _parts(found):
        _refuse_beyond(f"{file}: {where}", fields)
    _refuse_redirected(file, found)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a value of a wrong type or size raises whatever the code that it meets does
        expected = "a configuration that transformers knows by itself"
        got = "a size of 0" if isinstance(error, ZeroDivisionError) else reason(error)
        raise refuse(str(file), expected, got, MEND) from error
    _refuse_odd(file, config)
    _as_it_is_run(config)
    return config


def refuse_beyond_tensors(file: Path, tensors: int, most: int) -> None:
    """Raises Refusal where a configuration has more layers than there are tensors, or more experts than these
    and the largest axis of one, `most`: each would be planned."""
    for where, fields in _parts(read_object(file)):
        for name, value in fields.items():
            layers = LAYERS.fullmatch(name)
            bound = tensors if layers else max(tensors, most)
            counted = layers or name.endswith("experts")
            if counted and isinstance(value, int) and value > bound:
                what = "layers, for there are no more tensors" if layers else "experts, for none has more"
                raise refuse(f"{file}: {where}{name}", f"at most {bound} {what}", value, BELONGS)


def _parts(found: Mapping[str, Any], where: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping]]:
    """The fields of a configuration, and those of the configurations in it."""
    yield where, found
    for name, inner in found.items() if depth else ():
        if isinstance(inner, dict) and name.endswith("_config"):
            yield from _parts(inner, f"{where}{name}.", depth - 1)


def _refuse_unknown(file: Path, kind: Any) -> None:
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        alike = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), 1, cutoff=0.8)
        remedy = f"if that is a slip, write {alike[0]}; " if alike else ""
        remedy += "Python code that comes with a checkpoint is not run"
        if kind in ELSEWHERE:
            remedy = f"it is known in Python after `import {ELSEWHERE[kind]}`"
        got = reason(ValueError(repr(kind)))
        raise refuse(f"{file}: model_type", "one that transformers knows by itself", got, remedy)


def _refuse_beyond(where: str, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if callable(getattr(PreTrainedConfig, name, None)):  # it would take the method's place
            raise refuse(f"{where}{name}", "a field", "the name of a method", MEND)
        if not COUNTED.fullmatch(name):
            continue
        most = LABELS if name == "num_labels" else LARGEST
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int | float) and abs(size) > most:
                least = 1 if name in SIZES else -most
                raise refuse(f"{where}{name}", f"{least:,} to {most:,}", size, BELONGS)


def _refuse_redirected(file: Path, found: Mapping[str, Any]) -> None:
    if (other := found.get("transformers_weights")) is not None:
        remedy = "take the entry out, and name that file model.safetensors"
        raise refuse(f"{file}: transformers_weights", "none", reason(ValueError(repr(other))), remedy)
    classes = found.get("architectures")
    if not isinstance(classes, list | None) or not all(isinstance(x, str) for x in classes or ()):
        raise refuse(f"{file}: architectures", "a list of names", reason(ValueError(repr(classes))), MEND)


def _refuse_odd(file: Path, config: PreTrainedConfig) -> None:
    for name in QUANTIZED:
        if getattr(config, name, None):
            remedy = "dequantize the model, or remove that entry where its weights are floats"
            raise refuse(str(file), "a model that is not quantized", name, remedy)
    for name in STEADY:
        if not 0 <= getattr(config, name, 0.0) < math.inf:
            raise refuse(f"{file}: {name}", "at least 0, and finite", getattr(config, name), BELONGS)
    for name in SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and not 0 < size <= LARGEST:
            raise refuse(f"{file}: {name}", f"1 to {LARGEST:,}", size, BELONGS)


def _as_it_is_run(config: PreTrainedConfig) -> None:
    """What a configuration may ask for by name, and transformers would take from the Hub, is torch's here;
    outputs have names."""
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PreTrainedConfig):
            _as_it_is_run(inner)
    if config._attn_implementation not in ATTENTION:
        config._attn_implementation = None
    config._experts_implementation = None
    config.return_dict = True


def _no_checkpoint(path: Path) -> Refusal:
    """What is there in the place of a folder with config.json."""
    got, remedy, others = "nothing there", "name a folder that save_pretrained wrote", []
    if os.path.isdir(path):
        got, others = "a folder without it", sorted(path.glob("*.gguf"))
    elif os.path.isfile(path):
        got, others = "a file", [path] if path.suffix == ".gguf" else []
        if os.path.isfile(path.parent / CONFIG):
            remedy = f"name the folder that it is in, {path.parent}"
    if others:
        got, remedy = f"{others[0].name}, which is none", f"{remedy}, such as the model that it was made from"
    return refuse(str(path), "a checkpoint folder with config.json", got, remedy)
