"""What `growth train` adds to a Trainer, for a Trainer of one's own.

from growth.training.callbacks import StopOnNaN, UnfreezeOnPlateau, distilled, transferred, with_rates

optimizer = with_rates(torch.optim.AdamW(student.parameters(), lr=1e-3), student, {"*.mlp.*": 0.3})
with distilled(student, teacher, weight=0.5):
    ours = [UnfreezeOnPlateau(transferred(folder), patience=2), StopOnNaN()]
    Trainer(student, args, train_dataset=windows, callbacks=ours, optimizers=(optimizer, None)).train()

UnfreezeOnPlateau    holds weights still until the loss stops improving
StopOnNaN            stops before a loss that is no number is learned from
distilled            a student's loss with a teacher's in it, in bounded memory
with_rates           an optimizer whose groups train at shares of its rate
recorded_shares      the shares at which a grown model learns as its source did
WarmNewUnits         what growing added warms up by itself
transferred, copied  the names in growth.json that these take
"""

from growth.optimizing.shares import recorded_shares
from growth.training.distil import distilled
from growth.training.finite import NotFinite, StopOnNaN
from growth.training.freeze import UnfreezeOnPlateau, transferred
from growth.training.rates import copied, with_rates
from growth.training.warming import WarmNewUnits

__all__ = [
    "NotFinite",
    "StopOnNaN",
    "UnfreezeOnPlateau",
    "WarmNewUnits",
    "copied",
    "distilled",
    "recorded_shares",
    "transferred",
    "with_rates",
]
