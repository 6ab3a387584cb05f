"""Checkpoints for the growth tests: real transformers classes, pico sizes, weights larger than fresh ones."""

import torch
from tokenizers import AddedToken
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from growth.demo.corpus import byte_tokenizer


def neox(folder, dtype=torch.float32, **sizes):
    """A random GPT-NeoX of 3 layers x 96 (4 heads of 24), saved in `folder` with a byte tokenizer."""
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 256} | sizes
    config = GPTNeoXConfig(**{"num_hidden_layers": 3, "max_position_embeddings": 32} | sizes)
    return saved(GPTNeoXForCausalLM, config, folder, dtype)


def gpt2(folder, dtype=torch.float32, **sizes):
    """A random GPT-2 of the same sizes."""
    sizes = {"n_embd": 96, "n_head": 4, "n_layer": 3, "n_positions": 32, "vocab_size": 256} | sizes
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return saved(GPT2LMHeadModel, GPT2Config(**{"n_inner": 160} | tokens | sizes), folder, dtype)


def bert(folder, dtype=torch.float32, masked=True, **sizes):
    """A random BERT of the same sizes, whose tokenizer has a mask token, 256, unless not `masked`."""
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 257} | sizes
    config = BertConfig(**{"num_hidden_layers": 3, "max_position_embeddings": 32} | sizes)
    saved(BertForMaskedLM, config, folder, dtype)
    if masked:
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"mask_token": AddedToken("[MASK]", special=True)})
        tokenizer.save_pretrained(folder)
    return folder


def saved(kind, config, folder, dtype):
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


FAMILIES = {"gpt_neox": neox, "gpt2": gpt2, "bert": bert}
