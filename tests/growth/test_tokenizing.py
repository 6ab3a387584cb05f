"""Tokenizers that travel beside a model of another type read text as before."""

import json

import pytest
from checkpoints import pico
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    T5Tokenizer,
)

import growth
from growth.checkpoint import Checkpoint
from growth.companions import copy_companions
from growth.errors import Refusal
from growth.loading import load_tokenizer
from growth.tokenizing import SAMPLE, keep_tokenizer, other_tokens
from growth.training.teacher import find_teacher


def byte_level(*before):
    made = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_of])
    made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator([SAMPLE] * 3, trainers.BpeTrainer(vocab_size=340, **how))
    return made


def parts(made):
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def letters(*first, rest=""):
    found = [*first, *sorted(set(SAMPLE.replace(" ", "\u2581").lower()))]
    return found + [rest + x for x in found[len(first) :]] * bool(rest)


def numbered(words):
    return {word: i for i, word in enumerate(words)}


DIGITS = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")
TOKENIZERS = {
    "threes of digits": lambda: PreTrainedTokenizerFast(
        tokenizer_object=byte_level(DIGITS), eos_token="<|endoftext|>"
    ),
    "Qwen2": lambda: Qwen2Tokenizer(*parts(byte_level())),
    "GPT-2": lambda: GPT2Tokenizer(*parts(byte_level())),
    "Llama": lambda: LlamaTokenizer(numbered(letters("<unk>", "<s>", "</s>")), []),
    "WordPiece": lambda: BertTokenizer(
        numbered(letters("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", rest="##"))
    ),
    "Unigram": lambda: T5Tokenizer([(x, -1.0) for x in letters("<pad>", "</s>", "<unk>")], extra_ids=2),
}
BECOMES = {"qwen2": ("lci", "granitemoehybrid", "qwen2_moe"), "llama": ("lci", "granitemoehybrid", "mixtral")}
BECOMES |= {"gpt2": ("lci",), "mistral": ("lci", "mixtral"), "lci": ("granitemoehybrid",)}


def beside(folder, kind, made=None):
    if made:
        made.save_pretrained(folder)
    CONFIG_MAPPING[kind]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("made", TOKENIZERS.values(), ids=TOKENIZERS)
def test_beside_a_model_of_another_type_transformers_reads_text_as_before(tmp_path, made):
    tokenizer, changed = made(), 0
    for old, all_new in BECOMES.items():
        src = beside(tmp_path / old, old, tokenizer)
        own = load_tokenizer(src)
        for new in all_new:
            (out := tmp_path / f"{old} {new}").mkdir()
            copy_companions(src, out)
            changed += bool(other_tokens(own, load_tokenizer(beside(out, new))))
            keep_tokenizer(src, out)
            found = load_tokenizer(out)
            assert not other_tokens(own, found), (old, new)
            assert found.encode(SAMPLE) == own.encode(SAMPLE)
            assert found.special_tokens_map == own.special_tokens_map
    assert changed or isinstance(tokenizer, Qwen2Tokenizer)  # that of every qwen2


def test_a_tokenizer_that_stays_the_same_stays_byte_by_byte(tmp_path):
    src = beside(tmp_path / "src", "llama", TOKENIZERS["Llama"]())
    (out := tmp_path / "out").mkdir()
    copy_companions(src, out)
    keep_tokenizer(src, beside(out, "lci"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (src / name).read_bytes()


def test_the_source_of_a_transfer_is_its_teacher_and_a_tokenizer_that_splits_otherwise_is_none(tmp_path):
    sizes = {"vocab_size": 350, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    src = pico(Qwen2ForCausalLM, Qwen2Config, **sizes | heads)(tmp_path / "src")
    TOKENIZERS["threes of digits"]().save_pretrained(src)
    growth.transfer(src, tmp_path / "out", mixers="retention")
    student = Checkpoint(tmp_path / "out")
    assert find_teacher(src, student, 16).path == src
    TOKENIZERS["threes of digits"]().save_pretrained(student.path)  # which qwen2 has no use for
    with pytest.raises(Refusal, match="expected the student's tokenizer, got one that splits text otherwise"):
        find_teacher(src, student, 16)
