"""A step of training of a Mamba language model: transformers' own, and the same function on our ops."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from lcikernels.models import LCIConfig, LCIForCausalLM

HIDDEN, VOCABULARY, TOKENS = 768, 50280, 512  # mamba-130m's
NAMES = {"backbone.embeddings": "model.embed_tokens", "backbone.norm_f": "model.norm", "backbone": "model"}


def theirs(layers: int) -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=layers))


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> float:
        return 0.0


def ours(layers: int) -> LCIForCausalLM:
    """Mamba has no feed-forward blocks and norms without a mean: those of LCIForCausalLM are replaced."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=layers, intermediate_size=1)
    model = LCIForCausalLM(LCIConfig(**sizes, pattern="M" * layers, tie_word_embeddings=True))
    for block in model.model.layers:
        block.mixer_norm, block.mlp_norm, block.mlp = nn.RMSNorm(HIDDEN, eps=1e-5), nn.Identity(), Nothing()
    model.model.norm = nn.RMSNorm(HIDDEN, eps=1e-5)
    return model


def copy_weights(source: MambaForCausalLM, target: LCIForCausalLM) -> None:
    """Raises where a name or a shape does not fit."""
    renamed = {}
    for name, weight in source.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weight = weight.squeeze(1) if name.endswith("conv1d.weight") else weight
        renamed[name.replace(".norm.weight", ".mixer_norm.weight") if ".layers." in name else name] = weight
    target.load_state_dict(renamed)


def step(model: PreTrainedModel) -> Callable[[], float]:
    """Forward, backward, AdamW on one row of tokens; returns the loss before it."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (1, TOKENS))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

    def run() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def flops(model: PreTrainedModel) -> int:
    """Of the matrix products alone: 6 for each weight of a matrix and token."""
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6 * matrices * TOKENS
