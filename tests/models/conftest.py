from collections.abc import Callable

import pytest
import torch

from lcikernels.models import LCIConfig, LCIForCausalLM


@pytest.fixture
def tiny_config() -> Callable[..., LCIConfig]:
    """A config of 32 dims and 64 tokens. Its weights are wide enough for every mixer to move the logits."""

    def make(pattern: str, **changes) -> LCIConfig:
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": len(pattern),
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "initializer_range": 0.3,
            "sliding_window": 6 if "W" in pattern else None,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "eos_token_id": None,
            "pattern": pattern,
        }
        return LCIConfig(**(fields | changes))

    return make


@pytest.fixture
def tiny(tiny_config) -> Callable[..., LCIForCausalLM]:
    """A model of `tiny_config`, always the same weights, no bias 0 and no gain 1: what is left out shows.

    In float64 two ways to compute agree to 1e-11.
    """

    def make(pattern: str, dtype: torch.dtype = torch.float64, **changes) -> LCIForCausalLM:
        torch.manual_seed(0)
        model = LCIForCausalLM(tiny_config(pattern, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
