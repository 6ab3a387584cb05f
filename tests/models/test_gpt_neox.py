"""All-attention LCI is GPT-NeoX."""

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lcikernels.models import LCIConfig, LCIForCausalLM

MODULES = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mlp_norm",
    "attention.dense": "mixer.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def lci_weights(source: GPTNeoXForCausalLM) -> dict[str, Tensor]:
    """The source's tensors under the names of an all-attention LCI model."""
    heads = source.config.num_attention_heads
    out = {"lm_head.weight": source.lm_head.weight}
    out["model.embed_tokens.weight"] = source.gpt_neox.embed_in.weight
    out |= {f"model.norm.{name}": x for name, x in source.gpt_neox.final_layer_norm.named_parameters()}
    for i, layer in enumerate(source.gpt_neox.layers):
        for old, new in MODULES.items():
            module = layer.get_submodule(old)
            out |= {f"model.layers.{i}.{new}.{name}": x for name, x in module.named_parameters()}
        for name, fused in layer.attention.query_key_value.named_parameters():
            parts = fused.unflatten(0, (heads, 3, -1)).unbind(1)  # a head's rows: its q, its k, its v
            for letter, part in zip("qkv", parts):
                out[f"model.layers.{i}.mixer.{letter}_proj.{name}"] = part.flatten(0, 1)
    return out


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_all_attention_has_the_logits_of_gpt_neox(parallel, share):
    sizes = {
        "vocab_size": 80,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "use_parallel_residual": parallel,
        "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": share},
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    source = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, initializer_range=0.2)).eval()
    for name, x in source.named_parameters():
        if x.dim() == 1:  # biases start at 0 and gains at 1: a lost one would not show
            torch.nn.init.normal_(x, mean=float("layer" in name and name.endswith("norm.weight")), std=0.2)
    model = LCIForCausalLM(LCIConfig(**sizes, pattern="AAA")).eval()
    model.load_state_dict(lci_weights(source), strict=True)
    ids = torch.randint(80, (2, 33))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        for attention_mask in (None, mask):
            want = source(ids, attention_mask=attention_mask).logits
            got = model(ids, attention_mask=attention_mask).logits
            kept = mask.bool() if attention_mask is not None else torch.ones_like(ids).bool()
            torch.testing.assert_close(got[kept], want[kept], rtol=0, atol=2e-7 * want.abs().max().item())
    assert want.abs().max() > 1
    greedy = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **greedy), source.generate(ids, **greedy))
