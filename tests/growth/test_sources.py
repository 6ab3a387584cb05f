"""Every family of decoders, said in the words of our own model: kept attention computes what the source does."""

import json
from dataclasses import fields

import pytest
import torch
from checkpoints import ALL, DECODERS, inputs
from transformers import AutoModelForCausalLM, PreTrainedConfig

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.transferring.sources import SOURCES, lci_config, pattern_of


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On busy cores two wait for each other ten times as long as matrices of this size take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """name -> the folder of such a checkpoint."""
    made = {}

    def make(name):
        if name not in made:
            with quiet():
                made[name] = DECODERS[name](tmp_path_factory.mktemp("source") / "src")
        return made[name]

    return make


def greedy(folder, tokens):
    """The text that a model goes on with, by a cache; transformers loads it with no tensor missing or left."""
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


def config_of(name, **changes):
    """The configuration of such a checkpoint, as its class has it."""
    config = DECODERS[name].keywords["config"] if hasattr(DECODERS[name], "keywords") else None
    return config, changes


@pytest.mark.parametrize("name", DECODERS)
def test_what_stays_computes_the_source_s_logits_and_text(source, tmp_path, name):
    """Of 40 tokens, where windows are of 8; with a cache too."""
    src, own = source(name), pattern_of(Checkpoint(source(name)).config)
    kept = {"pattern": own} if set(own) - set("AW") else {"mixers": "attention"}
    report = growth.transfer(src, tmp_path / "out", **kept)
    agreement = growth.check(src, tmp_path / "out")
    assert report.lossless and not report.plan.dropped
    assert agreement.limit == max(1.0, agreement.largest) * 1e-5
    assert agreement.kept, agreement
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["lossless"] is True
    tokens = inputs(Checkpoint(src).config, 14)["input_ids"]
    assert torch.equal(greedy(tmp_path / "out", tokens), greedy(src, tokens))
