"""Token dropping: middle layers see the important tokens alone.  Hou et al., ACL 2022, arXiv 2203.13240.

    m_w     = beta m_w + (1 - beta) l_w      l_w the mean loss of word w where a step predicts it
    keep    the max(1, T - round(share T)) positions of each row whose words have the largest m_w, in order
    x[keep] = B_l(... B_f(x[keep]))          layers f .. l; the others' x stays that of before layer f

All of the tokens are together again before the last layers. A word that was never predicted is the most
important: [CLS], [SEP] and [MASK] never are. Equals are chosen among at random. Published for BERT, with
l_w a sum and half of the tokens; of grown models LiGO sets aside 15 % (arXiv 2303.00980). There layer f's
attention reads every token, here the kept ones. Of a causal model's row the choice is among all tokens, those
ahead too: a training loss tells a little of them, evaluation, which drops none, nothing.
"""

import base64
import math
import random

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, TrainerCallback
from transformers.trainer_callback import ExportableState

from growth.architecture import Attention, Op
from growth.errors import Refusal, refuse
from growth.training.flops import Saving, StepFlops
from growth.training.gathering import Gathering
from growth.training.layers import layers_of, seen_in

WHAT = "drop-tokens"


class TokenDropping(Saving, TrainerCallback, ExportableState):
    """Sets a `share` of the tokens aside in the layers from `first` to `last`, counted from 0, of a causal or
    masked language model (default: from the middle, less one, to the last but one).

    A callback for any `transformers.Trainer`; evaluation sees every token everywhere. The importances are in
    trainer_state.json: a resumed run equals an unbroken one. `seed` (default: the Trainer's) parts equals.
    A Trainer with a `compute_loss_func` takes the labels away from the model; such a function calls
    `learn(logits, labels)` itself, with labels that stand where their logits do.

    Raises Refusal where a number is none, and in training for models with recurrent layers, of another kind
    or of fewer than 3 layers, for packed windows, for flash attention, and where there are no logits.
    """

    def __init__(
        self,
        share: float = 0.15,
        first: int | None = None,
        last: int | None = None,
        beta: float = 0.99,
        seed: int | None = None,
    ):
        for name, x in (("a share of the tokens", share), ("a beta", beta)):
            if not 0 <= x < 1:
                raise refuse(
                    WHAT, f"{name} of at least 0 and below 1", x, "leave it out for the published one"
                )
        self.share, self.first, self.last, self.beta, self.seed = share, first, last, beta, seed
        self.importance = torch.empty(0)  # [words], inf where never predicted
        self._hooks: list[RemovableHandle] = []

    def state(self) -> dict:
        given = {"share": self.share, "first": self.first, "last": self.last}
        packed = base64.b64encode(self.importance.numpy().tobytes()).decode()
        return {
            "args": given | {"beta": self.beta, "seed": self.seed},
            "attributes": {"importance_float32": packed},
        }

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self._leave()  # a run that was broken off
        self._shifted, layers = self._fitting(model)
        words = model.get_input_embeddings().weight.shape[0]
        self.importance = torch.full((words,), math.inf)
        if state.global_step and (saved := state.stateful_callbacks.get(type(self).__name__)):
            known = base64.b64decode(saved["attributes"]["importance_float32"])
            self.importance = torch.from_numpy(np.frombuffer(known, np.float32).copy())
        self._gathering = Gathering(layers)
        self._names = list(layers)
        self._hooks = [
            model.register_forward_pre_hook(self._choose, with_kwargs=True),
            model.register_forward_hook(self._look, with_kwargs=True),
            *self._gathering.hooks(),
        ]
        self._seed = args.seed if self.seed is None else self.seed

    def on_step_begin(self, args, state, control, **kwargs):
        self._draw = random.Random(f"{self._seed} {state.global_step} {args.process_index}")
        self._sums = torch.zeros(2, len(self.importance), dtype=torch.float64)
        self._learned = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._learned:
            got = "a Trainer that takes the labels away"
            raise refuse(WHAT, "a model that computes its loss", got, "call learn in compute_loss_func")
        sums = self._sums.to(args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(sums)
        total, times = sums.cpu()
        mean, old = (total / times).float(), self.importance
        new = torch.where(old.isinf(), mean, self.beta * old + (1 - self.beta) * mean)
        self.importance = torch.where(times > 0, new, old)

    def on_train_end(self, args, state, control, **kwargs):
        self._leave()

    def spent(self, flops: StepFlops) -> StepFlops:
        return flops.on_tokens(self._names, 1 - self.share)

    def learn(self, logits: Tensor, labels: Tensor) -> None:
        """Takes the loss of each word from logits [..., V] and the words [...], -100 where there is none."""
        for row, words in zip(logits.detach().flatten(0, -2).split(512), labels.flatten().split(512)):
            there = words != -100
            losses = F.cross_entropy(row[there].float(), words[there], reduction="none")
            both = torch.stack([losses, torch.ones_like(losses)]).double().cpu()
            self._sums.index_add_(1, words[there].cpu(), both)
        self._learned = True

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _fitting(self, model: nn.Module) -> tuple[bool, dict[str, nn.Module]]:
        """Is the model causal; and the layers that see fewer tokens, by name."""
        seen, _ = seen_in(model, WHAT)
        kind = seen.family.model_type
        if seen.auto not in (AutoModelForCausalLM, AutoModelForMaskedLM):
            raise refuse(WHAT, "a causal or a masked language model", seen.written_as, "leave it out")
        if not all(map(_attends, seen.architecture.stacks[""].blocks.values())):
            got = f"a {kind} with recurrent ones"
            raise refuse(WHAT, "layers of attention, which take positions", got, "leave it out")
        if "flash" in (how := str(model.config._attn_implementation)):
            remedy = "load the model with attn_implementation sdpa"
            raise refuse(WHAT, "attention whose masks say which tokens it sees", how, remedy)
        (layers,) = layers_of(model, WHAT).values()
        first = max(1, len(layers) // 2 - 1) if self.first is None else self.first
        last = len(layers) - 2 if self.last is None else self.last
        if not 0 <= first <= last < len(layers):
            expected = f"layers first <= last, from 0 to {len(layers) - 1}"
            raise refuse(WHAT, expected, f"{first} to {last}", "name others, or leave it out")
        return seen.auto is AutoModelForCausalLM, dict([*layers.items()][first : last + 1])

    def _choose(self, model: nn.Module, arguments: tuple, named: dict) -> None:
        """Before each batch: the positions that middle layers see."""
        self._gathering.kept = None
        if not model.training:
            return
        words = named.get("input_ids", arguments[0] if arguments else None)
        if words is None:
            raise refuse(WHAT, "input_ids", "embeddings alone", "give the words")
        places = named.get("position_ids")
        if places is not None and (places.diff(dim=-1) != 1).any():
            raise refuse_packed()
        T = words.shape[1]
        score = self.importance.to(words.device)[words]
        mask = named.get("attention_mask")
        if mask is not None:
            score = score.masked_fill(mask == 0, -math.inf)
        generator = torch.Generator().manual_seed(self._draw.getrandbits(63))
        mixed = torch.rand(words.shape, generator=generator).argsort(1).to(words.device)
        ranked = score.gather(1, mixed).argsort(dim=1, descending=True, stable=True)
        best = mixed.gather(1, ranked)[:, : max(1, T - round(self.share * T))]
        self._gathering.keep(best.sort(1).values, T)

    def _look(self, model: nn.Module, arguments: tuple, named: dict, output) -> None:
        labels = named.get("labels")
        if not model.training or labels is None:
            return
        if getattr(output, "logits", None) is None:
            raise refuse_taught()
        logits = output.logits
        if self._shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        self.learn(logits, labels)


def _attends(block: tuple[Op, ...]) -> bool:
    """Does a layer know a token's place by its position, not by its turn? Retentions and scans have wires of
    their own names."""
    return [op.query for op in block if isinstance(op, Attention)] == ["query.{}"]


def refuse_taught() -> Refusal:
    """Of a student, whose loss is computed without logits."""
    remedy = "train without a teacher, or without this"
    return refuse(WHAT, "logits, for the loss of each word", "none", remedy)


def refuse_packed() -> Refusal:
    """Of windows whose documents are kept apart by their positions."""
    return refuse(WHAT, "windows of one text each", "packed ones", "leave out --pack, or this")
