"""Packed windows are for models that keep the documents of a row apart."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from growth.errors import reason, refuse

LENGTH = 8  # tokens of a document: a convolution of a Mamba sees 4


def refuse_mixing(model: PreTrainedModel, what: str = "pack") -> None:
    """Raises Refusal where the second of two documents in a row does not get the logits that it gets alone.

    As transformers' attention and LCI models read them: by position_ids that begin anew, without a mask and
    without a cache.
    """
    V = model.config.vocab_size
    ids = torch.randint(V, (1, 2 * LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)
    training, expected = model.training, "a model that keeps the documents of a row apart"
    kind, remedy = type(model).__name__, "train without --pack, documents one after the other"
    model.eval()
    try:
        packed, alone = _logits(model, ids)[:, LENGTH:], _logits(model, ids[:, LENGTH:])
    except (TypeError, ValueError) as error:  # it takes no positions
        raise refuse(what, expected, f"{kind}, which does not read them: {reason(error)}", remedy) from error
    finally:
        model.train(training)
    far = (packed - alone).abs().max().item()
    if far > torch.finfo(model.dtype).eps ** 0.5 * alone.abs().max().item():
        raise refuse(what, expected, f"{kind}, whose logits change by {far:.1e} by what is before", remedy)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    places = torch.arange(ids.shape[1], device=ids.device)[None] % LENGTH
    with torch.no_grad():
        return model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
