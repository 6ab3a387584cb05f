"""What `growth train` adds to a Trainer, for a Trainer of one's own.

from growth.training.callbacks import StopOnNaN, UnfreezeOnPlateau, distilled, transferred, with_rates

optimizer = with_rates(torch.optim.AdamW(student.parameters(), lr=1e-3), student, {"*.mlp.*": 0.3})
schedule = LambdaLR(optimizer, lemon(1000, warmup=50))
with distilled(student, teacher, weight=0.5):
    ours = [UnfreezeOnPlateau(transferred(folder), patience=2), StopOnNaN()]
    Trainer(student, args, train_dataset=windows, callbacks=ours, optimizers=(optimizer, schedule)).train()

OpenMasks            closes the masks of what `growth grow --method msg` added, and opens them
UnfreezeOnPlateau    holds weights still until the loss stops improving
StopOnNaN            stops before a loss that is no number is learned from
LayerDropping        skips layers at random, deep ones more often (progressive layer dropping)
SubmodelStage        trains sub-models of the bottom layers first (bert2BERT's two stages)
TokenDropping        middle layers see the words that are predicted worst
PruneAndRegrow       swaps neurons for fresh ones (RigL); taken_out lists those that it left out
train_in_stages      a run in which the model grows, at the end of each GrowAt
distilled            a student's loss with a teacher's in it, in bounded memory
with_rates           an optimizer whose groups train at shares of its rate
lemon, cosine        schedules, functions for torch's LambdaLR
recorded_shares      the shares at which a grown model learns as its source did
WarmNewUnits         what growing added warms up by itself
transferred, copied  the names in growth.json that these take

`growth.train(..., callbacks=[...])` takes them too.
"""

from growth.optimizing.shares import recorded_shares
from growth.training.distil import distilled
from growth.training.finite import NotFinite, StopOnNaN
from growth.training.freeze import UnfreezeOnPlateau, transferred
from growth.training.layer_dropping import LayerDropping
from growth.training.masks import OpenMasks
from growth.training.neurons import taken_out
from growth.training.pruning import PruneAndRegrow
from growth.training.rates import copied, with_rates
from growth.training.schedule import cosine, lemon
from growth.training.staged import GrowAt, train_in_stages
from growth.training.submodel import SubmodelStage
from growth.training.token_dropping import TokenDropping
from growth.training.warming import WarmNewUnits

__all__ = [
    "GrowAt",
    "LayerDropping",
    "NotFinite",
    "OpenMasks",
    "PruneAndRegrow",
    "StopOnNaN",
    "SubmodelStage",
    "TokenDropping",
    "UnfreezeOnPlateau",
    "WarmNewUnits",
    "copied",
    "cosine",
    "distilled",
    "lemon",
    "taken_out",
    "recorded_shares",
    "train_in_stages",
    "transferred",
    "with_rates",
]
