"""What lies beside the weights travels along: a sentence-transformers folder stays one, at its new width."""

import json
import shutil

import pytest
import torch
from checkpoints import bert, pico
from safetensors.torch import save_file
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

TYPES = "sentence_transformers.models"
POOLING = {"word_embedding_dimension": 96, "pooling_mode_mean_tokens": True, "include_prompt": True}
DENSE = {"in_features": 96, "out_features": 8, "bias": True, "activation_function": "torch.nn.Tanh"}


def write(file, values):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))


def read(file):
    return json.loads(file.read_text())


def modules(folder, **kinds):
    found = [{"idx": 0, "name": "0", "path": "", "type": f"{TYPES}.Transformer"}]
    found += [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"{TYPES}.{kind}"}
        for i, kind in enumerate(kinds, 1)
    ]
    write(folder / "modules.json", found)
    for i, (kind, config) in enumerate(kinds.items(), 1):
        (folder / f"{i}_{kind}").mkdir()
        if config:
            write(folder / f"{i}_{kind}" / "config.json", config)


@pytest.fixture
def src(tmp_path):
    folder = bert(tmp_path / "src", num_hidden_layers=2)
    modules(folder, Pooling=POOLING, Normalize={})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    return folder


def with_dense(folder):
    for name in ("1_Pooling", "2_Normalize"):
        shutil.rmtree(folder / name)
    modules(folder, Pooling=POOLING, Normalize={}, Dense=DENSE)
    save_file({"linear.weight": torch.randn(8, 96)}, folder / "3_Dense" / "model.safetensors")


def test_a_folder_of_sentence_transformers_stays_one_and_its_pooling_learns_the_width(src, tmp_path):
    growth.grow(src, tmp_path / "out", method="net2net", hidden_size=120)
    out = tmp_path / "out"
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert read(out / name) == read(src / name)
    assert read(out / "1_Pooling" / "config.json") == POOLING | {"word_embedding_dimension": 120}
    assert (out / "2_Normalize").is_dir() and read(out / "config.json")["hidden_size"] == 120


@pytest.mark.parametrize("name", ["word_embedding_dimension", "embedding_dimension"])
@pytest.mark.parametrize("width, becomes", [(96, 120), (50, 50)])
def test_a_pooling_of_another_width_is_left_alone_whatever_the_name_of_its_width(
    tmp_path, name, width, becomes
):
    (tmp_path / "src").mkdir()
    (tmp_path / "out").mkdir()
    modules(tmp_path / "src", Pooling={name: width, "pooling_mode": "mean"})
    copy_companions(tmp_path / "src", tmp_path / "out", (96, 120))
    assert read(tmp_path / "out" / "1_Pooling" / "config.json") == {name: becomes, "pooling_mode": "mean"}


def test_a_module_with_weights_travels_where_the_width_stays(src, tmp_path):
    with_dense(src)
    growth.grow(src, tmp_path / "out", method="stack", num_layers=4)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / "3_Dense" / name).read_bytes() == (src / "3_Dense" / name).read_bytes()


def test_a_module_whose_weights_no_longer_fit_is_refused_by_name(src, tmp_path):
    with_dense(src)
    message = (
        "3_Dense: expected .* 96, which becomes 120, got model.safetensors of its Dense module; grow the"
    )
    with pytest.raises(Refusal, match=message):
        growth.grow(src, tmp_path / "out", method="net2net", hidden_size=120)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/b", ".."])
def test_a_module_outside_its_folder_is_refused(tmp_path, path):
    (tmp_path / "secret").mkdir()
    for name in ("src", "out"):
        (tmp_path / name).mkdir()
    write(tmp_path / "src" / "modules.json", [{"path": path, "type": "x.Pooling"}])
    with pytest.raises(Refusal, match="expected modules in folders beside it"):
        copy_companions(tmp_path / "src", tmp_path / "out", (1, 2))


@pytest.mark.parametrize("found", [{}, [3], [{"path": "1_Pooling"}]], ids=str)
def test_modules_of_another_shape_are_refused(src, tmp_path, found):
    write(src / "modules.json", found)
    with pytest.raises(Refusal, match="modules.json: expected a list of objects with 'path' and 'type'"):
        growth.grow(src, tmp_path / "out", method="stack", num_layers=4)
    assert not (tmp_path / "out").exists()


def test_how_images_are_read_travels_and_the_longest_text_stays(src, tmp_path):
    for name in ("preprocessor_config.json", "processor_config.json"):
        write(src / name, {"size": {"height": 32, "width": 32}})
    tokenizer = read(src / "tokenizer_config.json") | {"model_max_length": 17}
    write(src / "tokenizer_config.json", tokenizer)
    growth.grow(src, tmp_path / "out", method="net2net", hidden_size=120)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        assert read(tmp_path / "out" / name) == read(src / name)


# ---- tokenizers


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
