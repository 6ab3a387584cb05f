"""Gradients of a model and of what was grown of it: a loss that both have, and what the dual maps make."""

import torch
from checkpoints import inputs
from exact import exact
from torch.nn import functional as F

import growth
from growth.checkpoint import Checkpoint
from growth.families import model_of
from growth.loading import load_model
from growth.optimizing.duals import Moment, carries
from growth.optimizing.saved import parts
from growth.plan import Source
from growth.sizes import resized


def scalar(model, batch, seed=0):
    """A loss of anything that a model gives, which its users would call the same for a wider one."""
    out, generator = model(**batch), torch.Generator().manual_seed(seed)
    for key in ("logits", "start_logits"):
        if key in out:
            weights = torch.randn(out[key].shape, generator=generator, dtype=out[key].dtype)
            return (out[key].log_softmax(-1) * weights).mean()
    cosines = F.normalize(out.last_hidden_state, dim=-1)
    cosines = cosines @ cosines.transpose(1, 2)
    loss = (cosines * torch.randn(cosines.shape, generator=generator, dtype=cosines.dtype)).mean()
    if out.get("pooler_output") is None:
        return loss
    return loss + F.cosine_similarity(*out.pooler_output, dim=0)


def gradients(folder):
    """By the names of the table."""
    checkpoint, network = Checkpoint(folder), exact(load_model(folder, torch.float64))
    scalar(network, inputs(checkpoint.config)).backward()
    known, found = parts(network, model_of(checkpoint.config, checkpoint.names)), {}
    for name, x in network.named_parameters():
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        each = [grad] if len(known[name]) == 1 else grad.reshape(len(known[name]), -1, grad.shape[-1])
        found |= dict(zip(known[name], each, strict=True))
    return found


def recipes(src, method, sizes, power=1, only_first=False):
    source = Source(Checkpoint(src))
    target = source.family.model(resized(source.model, sizes, method.layers), source.model.parts)
    maps = method.maps(source.model.architecture, target.architecture, 0)
    return source, carries(source, target, maps, power, only_first)


def agree(src, dst, method, sizes):
    """The grown model's gradients and their squares, of all but new layers, are those that the maps make."""
    growth.grow(src, dst, sizes, method)
    want, mine = gradients(dst), gradients(src)
    largest = max(x.abs().max() for x in want.values())
    for power in (1, 2):
        source, made = recipes(src, method, sizes, power)
        moment = Moment(source, {name: x**power for name, x in mine.items()})
        kept = {name: recipe for name, recipe in made.items() if not recipe.is_new}
        for name, recipe in kept.items():
            got = recipe.made(moment, filled=False)
            assert (got - want[name] ** power).abs().max() < 1e-9 * largest**power, name
    assert len(kept) == len(made) or sizes.layers
