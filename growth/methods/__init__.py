"""One paper, one file, one frozen dataclass of its options with maps(old, new, seed)."""

from typing import Any

from growth.errors import refuse
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
from growth.methods.method import Method
from growth.methods.msg import Msg
from growth.methods.mslt import Mslt
from growth.methods.net2net import Net2Net
from growth.methods.solar import Solar
from growth.methods.stacking import StackBert
from growth.methods.staged import Staged
from growth.methods.upcycle import Upcycle

DEPTH = StackBert, GStack, Interpolate, Solar, Mslt, LlamaPro  # what their papers are about; all widen too
WIDTH = Net2Net, Bert2Bert, HyperCloning, Lemon, Staged, Msg, GradMax
LEARNED = Ligo, Mango, Fine
METHODS: dict[str, type[Method]] = {method.name: method for method in (*DEPTH, *WIDTH, Upcycle, *LEARNED)}


def method_of(given: Any) -> Method:
    """A method, or the one of that name as it is by default."""
    if isinstance(given, str):
        if given not in METHODS:
            raise refuse("method", f"one of {', '.join(METHODS)}", given, "choose one of these")
        return METHODS[given]()
    if type(given) not in METHODS.values():
        raise refuse("method", "a method of growth.methods, or its name", repr(given), "such as Lemon()")
    return given
