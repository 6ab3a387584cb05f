"""growth: make a larger transformer out of a trained one, or one that is cheap to run.

grow(src, dst, Sizes(hidden=768, layers=12), Lemon())               a bigger model, in short form
grow(src, dst, method="lemon", hidden_size=768, num_layers=12)
transfer(src, dst, mixers="retention")                              a linear-cost one (XATL)
train(model, data, out, steps=1000)                                 finish either
check(src, dst)                                                     do the two agree?
"""

from importlib import import_module
from typing import TYPE_CHECKING

from growth.errors import Refusal

if TYPE_CHECKING:
    from growth.checking import check
    from growth.growing import grow
    from growth.methods import (
        Bert2Bert,
        GStack,
        HyperCloning,
        Interpolate,
        Lemon,
        Ligo,
        LlamaPro,
        Mango,
        Mslt,
        Net2Net,
        Solar,
        StackBert,
        Staged,
    )
    from growth.methods.gstack import growth_timing
    from growth.recipes.made import recipe_of
    from growth.recipes.running import run_recipe
    from growth.sizes import Sizes
    from growth.training.trainer import train
    from growth.transferring.align import Alignment
    from growth.transferring.xatl import transfer

__version__ = "0.1.0"
__all__ = ["Alignment", "Bert2Bert", "GStack", "HyperCloning", "Interpolate", "Lemon", "Ligo", "LlamaPro"]
__all__ += ["Mango", "Mslt", "Net2Net", "Refusal", "Sizes", "Solar", "StackBert", "Staged"]
__all__ += ["check", "grow", "growth_timing", "recipe_of", "run_recipe", "train", "transfer"]

METHODS = ("Bert2Bert", "GStack", "HyperCloning", "Interpolate", "Lemon", "Ligo", "LlamaPro", "Mango")
METHODS += ("Mslt", "Net2Net", "Solar", "StackBert", "Staged")
LAZY = dict.fromkeys(METHODS, "growth.methods") | {
    "Alignment": "growth.transferring.align",
    "check": "growth.checking",
    "grow": "growth.growing",
    "growth_timing": "growth.methods.gstack",
    "recipe_of": "growth.recipes.made",
    "run_recipe": "growth.recipes.running",
    "Sizes": "growth.sizes",
    "train": "growth.training.trainer",
    "transfer": "growth.transferring.xatl",
}


def __getattr__(name: str):
    # torch and transformers take 3 s to import, which `growth --help` and a typing error do not wait for.
    if name not in LAZY:
        raise AttributeError(f"module 'growth' has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)
