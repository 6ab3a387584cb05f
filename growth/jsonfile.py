"""JSON that somebody else wrote, and what is written over JSON."""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from growth.errors import reason, refuse

MOST_BYTES = 10**9  # an index of a million tensors has a tenth of that


def read_object(path: Path, *keys: str) -> dict:
    """The object in a file of JSON; a refusal where it is none, or has not these keys."""
    found = _read(path)
    wanted = "an object" if not keys else f"an object with {' and '.join(map(repr, keys))}"
    if not isinstance(found, dict) or not set(keys) <= set(found):
        got = "one without" if isinstance(found, dict) else type(found).__name__
        raise refuse(str(path), wanted, got, "copy or download it again")
    return found


def read_list(path: Path, *keys: str) -> list[dict]:
    """The list of objects in a file of JSON; a refusal where it is none, or one has not these keys."""
    found = _read(path)
    if not isinstance(found, list) or not all(isinstance(x, dict) and set(keys) <= set(x) for x in found):
        wanted = f"a list of objects with {' and '.join(map(repr, keys))}"
        raise refuse(str(path), wanted, "something else", "copy or download it again")
    return found


def rewrite(path: Path, found: dict, beside: Path | None = None) -> None:
    rewrite_text(path, json.dumps(found, indent=1), beside)


def rewrite_text(path: Path, text: str, beside: Path | None = None) -> None:
    """A process that is killed leaves the old file or the new; several may write it at once. beside: the
    folder, on the same disk, where a part of the new one may be left; else the file's own."""
    # Two machines have the same process ids.
    new = (beside or path.parent) / f".{path.name}.{secrets.token_hex(4)}"
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _read(path: Path) -> Any:
    """Whatever is in a file of JSON in UTF-8; a refusal where it is none."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise refuse(str(path), "a file of JSON", "something else", "copy or download it again")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        return json.loads(path.read_text("utf-8"))  # not bytes, of which other encodings would be guessed
    except RecursionError as error:
        raise refuse(str(path), "JSON", "objects nested too deeply", "copy or download it again") from error
    except ValueError as error:
        raise refuse(str(path), "JSON", reason(error), "copy or download it again") from error
    except OSError as error:
        raise refuse(str(path), "a file of JSON", error.strerror, "copy or download it again") from error
