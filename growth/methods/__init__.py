"""One paper, one file, one frozen dataclass of its options with maps(old, new, seed)."""

from typing import Any, ClassVar, Protocol

from growth.architecture import Architecture
from growth.errors import refuse
from growth.maps import Maps
from growth.methods.bert2bert import Bert2Bert
from growth.methods.fine import Fine
from growth.methods.gradmax import GradMax
from growth.methods.gstack import GStack
from growth.methods.hypercloning import HyperCloning
from growth.methods.interposition import Interpolate
from growth.methods.lemon import Lemon
from growth.methods.ligo import Ligo
from growth.methods.llama_pro import LlamaPro
from growth.methods.mango import Mango
from growth.methods.msg import Msg
from growth.methods.mslt import Mslt
from growth.methods.net2net import Net2Net
from growth.methods.solar import Solar
from growth.methods.stacking import StackBert
from growth.methods.staged import Staged
from growth.methods.upcycle import Upcycle


class Method(Protocol):
    """name: on the command line. lossless: does it promise to preserve the function, where that is possible?
    learned: does it learn from data? grows: the sizes, by their flags, that it can change. Its fields are its
    options; as a string it is what reports call it."""

    name: ClassVar[str]
    lossless: ClassVar[bool]
    learned: ClassVar[bool]
    grows: ClassVar[frozenset[str]]

    def layers(self, old: int, new: int) -> tuple[int, ...]:
        """The old layer that each of `new` layers takes its inside from."""

    def depth(self, wanted: int | None, old: int) -> int | None:
        """The layers of the target of a source of `old`, where these are not said."""

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`; those that learning starts from."""


DEPTH = StackBert, GStack, Interpolate, Solar, Mslt, LlamaPro  # what their papers are about; all widen too
WIDTH = Net2Net, Bert2Bert, HyperCloning, Lemon, Staged, Msg, GradMax
LEARNED = Ligo, Mango, Fine
METHODS: dict[str, type] = {method.name: method for method in (*DEPTH, *WIDTH, Upcycle, *LEARNED)}


def method_of(given: Any) -> Method:
    """A method, or the one of that name as it is by default."""
    if isinstance(given, str):
        if given not in METHODS:
            raise refuse("method", f"one of {', '.join(METHODS)}", given, "choose one of these")
        return METHODS[given]()
    if type(given) not in METHODS.values():
        raise refuse("method", "a method of growth.methods, or its name", repr(given), "such as Lemon()")
    return given
