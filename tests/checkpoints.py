"""Checkpoints for the growth tests: real transformers classes, pico sizes, weights larger than fresh ones."""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from growth.demo.corpus import byte_tokenizer


def neox(folder, dtype=torch.float32, **sizes):
    """A random GPT-NeoX of 3 layers x 96 (4 heads of 24), saved in `folder` with a byte tokenizer."""
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 160,
    } | sizes
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=256, max_position_embeddings=32, **sizes)).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
