"""The one refusal of this package: a complete sentence, raised before anything is written."""

import os
from collections.abc import Sequence

MOST = 2000  # characters of a part of a refusal


class Refusal(ValueError):
    """A call that cannot be served. The command line prints the message on one line and exits with code 2."""


class Alone(Refusal):
    """What one of several processes found alone: it is printed there, whichever that is."""


def first_process() -> bool:
    """Whether this process speaks for all that torchrun or accelerate started together."""
    return int(os.environ.get("RANK", 0)) == 0


def refuse(what: str, expected: object, got: object, remedy: str) -> Refusal:
    """`what: expected ..., got ...; remedy`, ready to be raised; of what is long, the beginning."""
    what, expected, got = (
        f"{text[:MOST]} ..." if len(text := str(x)) > MOST else text for x in (what, expected, got)
    )
    return Refusal(" ".join(f"{what}: expected {expected}, got {got}; {remedy}".split()))


def refuse_odd_seed(seed: int) -> None:
    """Raises Refusal where a seed is none that every library here takes."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise refuse("seed", "0 to 4294967295", seed, "choose one of these")


def several(losses: Sequence[str]) -> str:
    """The first, and how many more."""
    return losses[0] + (f"; and {len(losses) - 1} more" if len(losses) > 1 else "")


def explained(error: ImportError) -> ImportError:
    """The same, with how to get the library that is missing or too old; as it is where the fault is ours."""
    if (error.name or "").split(".")[0] in ("growth", "lcikernels") or "pip install" in str(error):
        return error
    told = f"{reason(error)}; pip install 'lcikernels[growth]' brings what growth needs"
    return type(error)(told, name=error.name)


def reason(error: BaseException, most: int = 300) -> str:
    """What somebody else's error says, on one line; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."
