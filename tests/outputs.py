"""What transformers computes of a checkpoint, and how far two such outputs lie apart."""

import json

import torch
from checkpoints import inputs
from exact import exact, exact_softmax
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from growth.loading import quiet

AUTOS = {
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "EncoderModel": AutoModelForTextEncoding,
    "Model": AutoModel,
}
GIVEN = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def run(folder, dtype):
    """The model's configuration and what it gives; transformers loads it with no tensor missing or left."""
    with quiet():
        named = json.loads((folder / "config.json").read_text())["architectures"][0]
        auto = next(auto for end, auto in AUTOS.items() if named.endswith(end))
        model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert type(model).__name__ == named
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad(), exact_softmax():
        out = exact(model)(**inputs(model.config))
    return model.config, [out[name] for name in GIVEN if out.get(name) is not None]


def error(truth, got):
    """The largest difference of the channels that both have, over the largest number there."""
    return max(((y[..., : x.shape[-1]] - x).abs().max() / x.abs().max()).item() for x, y in zip(truth, got))
