"""The configurations of the demo's models, and what makes a fresh one of each."""

from collections.abc import Callable

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    ViTConfig,
)

from growth.demo.scales import Numbers, Size

# Weights of about 1 / sqrt(width): at these widths the usual 0.02 ends a fifth of a nat a byte higher.
DEVIATION = 0.1


def sizes(size: Size) -> dict:
    return {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.ffn or 4 * size.hidden,
    }


def gpt_neox(numbers: Numbers, size: Size, vocabulary: int) -> GPTNeoXConfig:
    """Rotary positions on whole heads: the usual quarter ends higher."""
    return GPTNeoXConfig(
        vocab_size=vocabulary,
        **sizes(size),
        max_position_embeddings=numbers.corpus.length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        initializer_range=DEVIATION,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def llama(numbers: Numbers, size: Size, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        **sizes(size),
        max_position_embeddings=numbers.corpus.length,
        tie_word_embeddings=True,
        initializer_range=size.hidden**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def bert(numbers: Numbers, size: Size, vocabulary: int) -> BertConfig:
    """Of the usual deviation, 0.02: of 1 / sqrt(width) it learned the frequency of tokens alone."""
    return BertConfig(
        vocab_size=vocabulary,
        **sizes(size),
        max_position_embeddings=numbers.corpus.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )


def vit(numbers: Numbers, size: Size, classes: int) -> ViTConfig:
    """Of digits: 16 patches of 2 x 2 pixels."""
    return ViTConfig(
        **sizes(size),
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=classes,
        initializer_range=DEVIATION,
    )


Configured = Callable[[Numbers, Size, int], PreTrainedConfig]
MODELS: dict[str, tuple[Configured, type]] = {
    "gpt_neox": (gpt_neox, AutoModelForCausalLM),
    "llama": (llama, AutoModelForCausalLM),
    "bert": (bert, AutoModelForMaskedLM),
    "vit": (vit, AutoModelForImageClassification),
}
