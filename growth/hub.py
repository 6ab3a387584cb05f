"""A checkpoint by its name: a folder, or a model of the Hugging Face Hub, from its cache or from there."""

import contextlib
import os
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from growth.card import CARD
from growth.companions import BESIDE, GENERATION, MODULES, SENTENCE, TOKENIZER
from growth.errors import Refusal, reason, refuse
from growth.folders import named_folder
from growth.record import RECORD

TENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
# A repository may hold the weights in five formats more; none of these is read.
WANTED = [
    "config.json",
    *TENSORS,
    "adapter_*",
    GENERATION,
    MODULES,
    "[0-9]_*/*",
    CARD,
    RECORD,
    *TOKENIZER,
    *SENTENCE,
    *BESIDE,
]
SECONDS = 10  # in which the Hub answers; else what lies in the cache is taken


def resolve(src: str | Path) -> Path:
    """The folder `src`; where there is none, that of the Hub's model `owner/name` or `owner/name@revision`.

    A model is downloaded, as far as it is not in the cache; without a connection, or with HF_HUB_OFFLINE, it
    is what the cache has. What is no name of a model is given back as it is. Raises Refusal where there is
    no such model, or it may not be read.
    """
    path = named_folder(src, "checkpoint")
    name, _, revision = str(src).partition("@")
    if os.path.lexists(path) or not _is_name(name):
        return path
    got = partial(snapshot_download, name, revision=revision or None, allow_patterns=WANTED)
    try:
        # The download itself would wait for the first answer without end.
        HfApi().model_info(name, revision=revision or None, timeout=SECONDS)
        return Path(got(etag_timeout=SECONDS))
    except Exception as error:  # the Hub's, the connection's and the disk's have no common base
        why = error
    try:
        return Path(got(local_files_only=True))
    except IncompleteSnapshotError as error:
        why = error
    except (OSError, ValueError):  # not there, or under a name that is none
        pass
    raise _refusal(str(src), name, revision, why) from why


def _is_name(name: str) -> bool:
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        return True
    return False


def _refusal(src: str, name: str, revision: str, why: Exception) -> Refusal:
    got = f"nothing there, and no answer for the Hub's model of that name ({reason(why)})"
    remedy = (
        f"name a folder that save_pretrained wrote, or call `hf download {name}` where there is a network"
    )
    if isinstance(why, GatedRepoError):
        got, remedy = "a gated model", "ask for access on its page, then call `hf auth login`"
    elif isinstance(why, RepositoryNotFoundError):
        got = "nothing there, and no such model that you may read"
        remedy = "check the name; where it is private, call `hf auth login` first"
    elif isinstance(why, RevisionNotFoundError):
        got, remedy = f"no revision {revision}", "name a branch, a tag or a commit that it has"
    elif isinstance(why, IncompleteSnapshotError):
        got, remedy = "a part of it in the cache", f"call `hf download {name}` where there is a network"
    return refuse(src, "a checkpoint folder with config.json, or a model of the Hub", got, remedy)
