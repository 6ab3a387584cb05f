"""Checkpoints for the growth tests: real transformers classes, pico sizes, weights larger than fresh ones.

ALL has every family that grows, in its variants: a maker each, of (folder, dtype, **fields of the
configuration). Gains are not one and biases are not zero. PLAIN names one or two of each family. `inputs`
makes what such a model takes.
"""

from collections import OrderedDict
from collections.abc import Hashable
from functools import cache, partial

import torch
from tokenizers import AddedToken
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from growth.demo.corpus import byte_tokenizer
from lcikernels.models import LCIConfig, LCIForCausalLM


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
        tokenizer(masked).save_pretrained(folder)
    return folder


# The files of checkpoints that were made, the latest last, and the state of torch's generator then.
MADE: OrderedDict[Hashable, tuple[dict[str, bytes], torch.Tensor]] = OrderedDict()
KEPT = 64  # of 1 or 2 MB


def saved(kind, config, folder, dtype):
    """What was made before is written again."""
    key = kind, type(config), config.to_json_string(use_diff=False), dtype
    alone = not folder.exists()
    if alone and key in MADE:
        files, state = MADE[key]
        MADE.move_to_end(key)
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        torch.set_rng_state(state)
        return folder
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if alone:
        MADE[key] = {path.name: path.read_bytes() for path in folder.iterdir()}, torch.get_rng_state()
    if len(MADE) > KEPT:
        MADE.popitem(last=False)
    return folder


@cache
def tokenizer(masked=False):
    made = byte_tokenizer()
    if masked:
        made.add_special_tokens({"mask_token": AddedToken("[MASK]", special=True)})
    return made


FAMILIES = {"gpt_neox": neox, "gpt2": gpt2, "bert": bert}

VOCAB, POSITIONS = 61, 40
WIDE = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE |= {"intermediate_size": 96, "max_position_embeddings": POSITIONS}
GROUPED = WIDE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADED = GROUPED | {"head_dim": 16}
EXPERTS = GROUPED | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
HYBRID = {"shared_intermediate_size": 96, "num_local_experts": 0, "num_experts_per_tok": 0}
HYBRID |= {"layer_types": ["mamba", "attention", "mamba"], "attention_multiplier": 0.25}
HYBRID |= {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
HYBRID |= {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
LCI = WIDE | {"state_size": 8, "mamba2_state_size": 8, "mamba2_num_heads": 8}
LCI_RMS = LCI | {
    "norm": "rms",
    "gated_mlp": True,
    "mlp_bias": False,
    "use_parallel_residual": False,
    "num_key_value_heads": 2,
    "retention_num_kv_heads": 2,
    "sliding_window": 8,
}
# Heads of 24 are wider together than the stream; gains are stored less one.
LCI_AROUND = LCI_RMS | {
    "norm_placement": "around",
    "zero_centered_norms": True,
    "qk_norm": "head",
    "head_dim": 24,
    "retention_head_dim": 24,
    "retention_learned_decay": True,
    "attention_out_bias": False,
    "embedding_scale": 8.0,
    "no_rope_layers": [1],
}
LCI_INSIDE = LCI_RMS | {"norm_placement": "inside", "qk_norm": "all", "attention_bias": False}
LCI_LEARNED = LCI | {
    "position_embedding_type": "learned",
    "tie_word_embeddings": True,
    "retention_learned_decay": True,
    "residual_scale": 0.5,
    "logits_scale": 0.5,
    "attention_softcap": 20.0,
    "final_softcap": 10.0,
}
T5 = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}
T5 |= {
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}


def pico(kind, config, **fields):
    """A maker of random checkpoints of this class: mostly 3 layers x 64, 4 heads of 16."""

    def make(folder, dtype=torch.float32, **sizes):
        return saved(kind, config(**fields | sizes), folder, dtype)

    return make


def t5_1_1(folder, dtype=torch.float32, **sizes):
    """A T5 with a head of its own, which transformers makes none of but loads."""
    config = T5Config(**T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | sizes)
    torch.manual_seed(1)
    own = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model, dtype=dtype))
    return saved(partial(_with_head, own), config, folder, dtype)


def _with_head(own, config):
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = own
    return model


ALL = {
    "gpt_neox": pico(GPTNeoXForCausalLM, GPTNeoXConfig, **WIDE),
    "gpt_neox tied": pico(GPTNeoXForCausalLM, GPTNeoXConfig, **WIDE, tie_word_embeddings=True),
    "gpt2": pico(
        GPT2LMHeadModel,
        GPT2Config,
        vocab_size=VOCAB,
        n_embd=64,
        n_head=4,
        n_layer=3,
        n_positions=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": pico(LlamaForCausalLM, LlamaConfig, **GROUPED),
    "llama with biases, tied": pico(
        LlamaForCausalLM,
        LlamaConfig,
        **GROUPED,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "mistral": pico(MistralForCausalLM, MistralConfig, **HEADED, sliding_window=8),
    "qwen2": pico(
        Qwen2ForCausalLM,
        Qwen2Config,
        **GROUPED,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3": pico(Qwen3ForCausalLM, Qwen3Config, **GROUPED, head_dim=24),
    "mixtral": pico(
        MixtralForCausalLM,
        MixtralConfig,
        **HEADED,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=8,
    ),
    "qwen2_moe": pico(
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        **EXPERTS,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3_moe": pico(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        **EXPERTS,
        head_dim=24,
        attention_bias=True,
        decoder_sparse_step=2,
        norm_topk_prob=True,
    ),
    "gemma": pico(GemmaForCausalLM, GemmaConfig, **HEADED),
    "gemma2": pico(Gemma2ForCausalLM, Gemma2Config, **HEADED, sliding_window=8),
    "gemma3_text": pico(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        **HEADED,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": pico(Phi3ForCausalLM, Phi3Config, **GROUPED),
    "olmo2": pico(Olmo2ForCausalLM, Olmo2Config, **GROUPED),
    "granite": pico(
        GraniteForCausalLM,
        GraniteConfig,
        **GROUPED,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    **{
        f"granitemoehybrid{name}": pico(
            GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, **GROUPED, **HYBRID, **fields
        )
        for name, fields in {
            "": {},
            " rope, biases, tied": {
                "position_embedding_type": "rope",
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        }.items()
    },
    "smollm3": pico(SmolLM3ForCausalLM, SmolLM3Config, **GROUPED, no_rope_layers=[1, 0, 1]),
    "bert": pico(BertForMaskedLM, BertConfig, **WIDE),
    "bert headless": pico(BertModel, BertConfig, **WIDE),
    "bert classifier": pico(BertForSequenceClassification, BertConfig, **WIDE, num_labels=5),
    "bert token classifier": pico(BertForTokenClassification, BertConfig, **WIDE, num_labels=5),
    "bert answers": pico(BertForQuestionAnswering, BertConfig, **WIDE),
    "roberta": pico(RobertaForMaskedLM, RobertaConfig, **WIDE),
    "roberta headless": pico(RobertaModel, RobertaConfig, **WIDE),
    "roberta classifier": pico(RobertaForSequenceClassification, RobertaConfig, **WIDE, num_labels=5),
    "t5": pico(T5ForConditionalGeneration, T5Config, **T5),
    "t5 gated": pico(T5ForConditionalGeneration, T5Config, **T5, feed_forward_proj="gated-gelu"),
    "t5 1.1": t5_1_1,
    "t5 encoder": pico(T5EncoderModel, T5Config, **T5),
    **{
        f"lci {pattern}": pico(LCIForCausalLM, LCIConfig, **LCI, pattern=pattern)
        for pattern in ("AAA", "RRR", "MMM", "SSS", "RAM", "SMA")
    },
    "lci around RWA": pico(LCIForCausalLM, LCIConfig, **LCI_AROUND, pattern="RWA"),
    "lci inside WRS": pico(LCIForCausalLM, LCIConfig, **LCI_INSIDE, pattern="WRS"),
    "lci learned ARM": pico(LCIForCausalLM, LCIConfig, **LCI_LEARNED, pattern="ARM"),
}

# Of each family one or two.
PLAIN = [name for name in ALL if " " not in name] + ["t5 1.1", "lci RAM", "lci SMA"]


def inputs(config, T=24):
    """Two sequences, as a model of this configuration takes them: with token types, or for a decoder too."""
    generator = torch.Generator().manual_seed(1)

    def some(V):
        return torch.randint(3, V, (2, T), generator=generator)

    made = {"input_ids": some(config.vocab_size)}
    if config.model_type == "bert":
        made["token_type_ids"] = torch.randint(config.type_vocab_size, (2, T), generator=generator)
    if config.is_encoder_decoder:
        made["decoder_input_ids"] = some(config.vocab_size)[:, : T - 5]
    return made
