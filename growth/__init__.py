"""growth: make a larger transformer out of a trained one, or one that is cheap to run.

grow(src, dst, Sizes(hidden=768, layers=12), Lemon())               a bigger model, in short form
grow(src, dst, method="lemon", hidden_size=768, num_layers=12)
shrink(large, dst, num_layers=6, ffn_size=1024, score="activation", data="text")      the way back
transfer(src, dst, mixers="retention")                              a linear-cost one (XATL)
train(model, data, out, steps=1000)                                 finish either
check(src, dst)                                                     do the two agree?
"""

from importlib import import_module
from typing import TYPE_CHECKING

from growth.errors import Refusal, explained
from growth.methods import (
    Bert2Bert,
    Fine,
    GradMax,
    GStack,
    HyperCloning,
    Interpolate,
    Lemon,
    Ligo,
    LlamaPro,
    Mango,
    Msg,
    Mslt,
    Net2Net,
    Solar,
    StackBert,
    Staged,
    Upcycle,
)
from growth.methods.gstack import growth_timing

if TYPE_CHECKING:
    from growth.checking import check
    from growth.growing import grow
    from growth.recipes.made import recipe_of
    from growth.recipes.running import run_recipe
    from growth.shrinking.shrinking import shrink
    from growth.sizes import Sizes
    from growth.training.trainer import train
    from growth.transferring.align import Alignment
    from growth.transferring.xatl import transfer

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "Bert2Bert",
    "Fine",
    "GStack",
    "GradMax",
    "HyperCloning",
    "Interpolate",
    "Lemon",
    "Ligo",
    "LlamaPro",
    "Mango",
    "Msg",
    "Mslt",
    "Net2Net",
    "Refusal",
    "Sizes",
    "Solar",
    "StackBert",
    "Staged",
    "Upcycle",
    "check",
    "grow",
    "growth_timing",
    "recipe_of",
    "run_recipe",
    "shrink",
    "train",
    "transfer",
]

LAZY = {
    "Alignment": "growth.transferring.align",
    "check": "growth.checking",
    "grow": "growth.growing",
    "recipe_of": "growth.recipes.made",
    "run_recipe": "growth.recipes.running",
    "shrink": "growth.shrinking.shrinking",
    "Sizes": "growth.sizes",
    "train": "growth.training.trainer",
    "transfer": "growth.transferring.xatl",
}


def __getattr__(name: str):
    # torch and transformers take 3 s to import, which `growth --help` and a typing error do not wait for.
    if name not in LAZY:
        raise AttributeError(f"module 'growth' has no attribute {name!r}")
    try:
        module = import_module(LAZY[name])
    except ImportError as error:
        raise explained(error) from error
    return getattr(module, name)
