"""The checkpoints that transfer takes: every decoder that grows, and variants that growing does not see."""

from checkpoints import ALL, GROUPED, HEADED, POSITIONS, VOCAB, WIDE, pico
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


def turned(rope_type, **fields):
    """A maker of Llamas with such rotary positions, trained on 16 of their 40 tokens."""
    rope = {"rope_theta": 10000.0, "rope_type": rope_type, **fields}
    limits = {} if rope_type == "dynamic" else {"original_max_position_embeddings": 16}
    # A dynamic one changes beyond all of its positions.
    positions = {"max_position_embeddings": 16} if rope_type == "dynamic" else {}
    return pico(LlamaForCausalLM, LlamaConfig, **GROUPED | positions, rope_parameters=rope | limits)


MOES = ("mixtral", "qwen2_moe", "qwen3_moe")
PAIRS = 8  # of a head of 16
LONG = {"short_factor": [1.0 + i / 8 for i in range(PAIRS)], "long_factor": [2.0 + i for i in range(PAIRS)]}
DECODERS = {
    **{name: make for name, make in ALL.items() if not name.startswith(("bert", "roberta", "t5", *MOES))},
    "gpt_neox in sequence": pico(
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        **WIDE,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="relu",
    ),
    "gpt2 by layers": pico(
        GPT2LMHeadModel,
        GPT2Config,
        vocab_size=VOCAB,
        n_embd=64,
        n_head=4,
        n_layer=3,
        n_inner=96,
        n_positions=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "llama linear": turned("linear", factor=4.0),
    "llama dynamic": turned("dynamic", factor=4.0),
    "llama yarn": turned("yarn", factor=4.0),
    "llama llama3": turned("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "phi3 partial": pico(
        Phi3ForCausalLM,
        Phi3Config,
        **GROUPED,
        sliding_window=8,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "phi3 longrope": pico(
        Phi3ForCausalLM,
        Phi3Config,
        **GROUPED,
        original_max_position_embeddings=16,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "longrope", **LONG},
    ),
    "qwen3 with windows": pico(
        Qwen3ForCausalLM,
        Qwen3Config,
        **HEADED,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "gemma2 uncapped": pico(
        Gemma2ForCausalLM,
        Gemma2Config,
        **HEADED,
        sliding_window=8,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=24,
        tie_word_embeddings=False,
    ),
    "gemma3_text of two turns": pico(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        **HEADED,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    ),
    "smollm3 with windows": pico(
        SmolLM3ForCausalLM,
        SmolLM3Config,
        **GROUPED,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=8,
    ),
}
