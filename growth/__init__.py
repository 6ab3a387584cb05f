"""growth: make a larger transformer out of a trained one, or one that is cheap to run.

grow(src, dst, method="lemon", hidden_size=768, num_layers=12)      a bigger model
transfer(src, dst, mixers="retention")                              a linear-cost one (XATL)
train(model, data, out, steps=1000)                                 finish either
check(src, dst)                                                     do the two agree?
"""

__version__ = "0.1.0"

from growth.check import check
from growth.errors import Refusal
from growth.grow import grow
from growth.training.trainer import train
from growth.transfer import transfer

__all__ = ["Refusal", "check", "grow", "train", "transfer"]
