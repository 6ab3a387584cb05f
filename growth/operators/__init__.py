"""One paper, one file, one function that returns maps."""

from collections.abc import Callable

from growth.maps import Maps
from growth.operators.lemon import lemon
from growth.operators.ligo import ligo
from growth.operators.mango import mango
from growth.operators.net2net import net2net
from growth.operators.stacking import interpolate, stack

OPERATORS: dict[str, Callable[..., Maps]] = {
    "stack": stack,
    "interpolate": interpolate,
    "net2net": net2net,
    "lemon": lemon,
    "ligo": ligo,
    "mango": mango,
}
LEARNED = ("ligo", "mango")
