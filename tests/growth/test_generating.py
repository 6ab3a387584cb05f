"""`check --generate`: what the figures are, what a tie is, and that the cache is checked too."""

import json
import sys

import pytest
import torch
from checkpoints import ALL, neox
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import growth
from growth.__main__ import main
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.families import FAMILIES
from growth.generating import refuse_no_writer
from growth.probes import probe
from lcikernels.layers import Retention

NEW = 12


def decodes(name: str) -> bool:
    """Is the maker's family one of decoders?"""
    return FAMILIES[name.split()[0]].probe == "tokens"


DECODERS = [name for name in ALL if decodes(name)]
OTHERS = [name for name in ALL if not decodes(name)]


@pytest.mark.parametrize("name", DECODERS)
def test_what_equals_its_source_continues_every_prompt_as_it_does(tmp_path, name):
    """And the cache of every family gives what its whole text does."""
    src = ALL[name](tmp_path / "src")
    growth.grow(src, tmp_path / "out", method="lemon", hidden_size=128)
    agreement = growth.check(src, tmp_path / "out", generate=NEW)
    got = agreement.generated
    assert agreement.kept and got.promised and got.apart == 0
    assert (got.count, got.tokens, got.identical, got.before, got.agreeing) == (8, NEW, 1, NEW, 1)
    assert 0 < max(got.cached) < got.limit
    assert str(agreement).endswith("promised the same: kept") and "CACHE" not in str(agreement)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral", "qwen3", "granite", "lci SMA"])
def test_a_transfer_that_keeps_every_mixer_continues_every_prompt_as_its_source(tmp_path, name):
    """Learned positions, caps, windows, norms of q and k, scales: in our own model, with its own cache."""
    src = ALL[name](tmp_path / "src")
    keep = {"pattern": "SMA"} if name == "lci SMA" else {"mixers": "attention"}
    growth.transfer(src, tmp_path / "out", **keep)
    got = growth.check(src, tmp_path / "out", generate=NEW).generated
    assert got.promised and got.kept and (got.identical, got.before, got.agreeing) == (1, NEW, 1)


@pytest.mark.parametrize("name", OTHERS)
def test_what_continues_no_text_is_refused_by_its_kind(tmp_path, name):
    src = Checkpoint(ALL[name](tmp_path / "src"))
    family = name.split()[0]
    got = f"got a {family}, .*, of {FAMILIES[family].probe}; leave it out"
    with pytest.raises(Refusal, match=f"^generate: expected decoders, which continue a text, {got}"):
        refuse_no_writer(src, src, NEW)


@torch.no_grad()
def greedy(model, ids, tokens):
    """Without a cache, a token at a time."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_the_figures_are_those_of_generating_without_a_cache(source, text, tmp_path):
    """Of models that agree in part: a mixer is replaced in one layer, and its output made small."""
    growth.transfer(source, tmp_path / "out", keep_attention=[0, 2])
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mixer.o_proj.weight"] *= 0.3
    save_file(tensors, file, {"format": "pt"})
    generated = growth.check(source, tmp_path / "out", text=text, generate=NEW).generated
    prompts = probe(Checkpoint(source), Checkpoint(source), text, batch=8, length=20)["input_ids"]
    old, new = (AutoModelForCausalLM.from_pretrained(x) for x in (source, tmp_path / "out"))
    want, free = greedy(old, prompts, NEW)[:, 20:], greedy(new, prompts, NEW)[:, 20:]
    before = [next((t for t in range(NEW) if a[t] != b[t]), NEW) for a, b in zip(want, free)]
    with torch.no_grad():
        forced = new(torch.cat([prompts, want], 1)).logits[:, 19:-1].argmax(-1)
    assert prompts.shape == (8, 20) and generated.count == 8 and generated.tokens == NEW
    assert generated.before == pytest.approx(sum(before) / 8) and 0 < generated.before < NEW
    assert generated.identical == sum(x == NEW for x in before) / 8
    assert generated.agreeing == pytest.approx((forced == want).double().mean().item())
    assert 0 < generated.agreeing < 1 and generated.apart > 0 and not generated.promised


def with_rivals(folder, by):
    """A model whose logit of 5 is the largest everywhere, and that of 9 less by this share."""
    src = neox(folder)
    tensors = load_file(src / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.bias"][:] = 1.0
    tensors["embed_out.weight"][[5, 9]] = 0.5
    tensors["embed_out.weight"][9] *= 1 - by
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    return src


@pytest.mark.parametrize("by, kept", [(1e-6, True), (2e-3, False)])
def test_a_difference_within_rounding_is_a_tie_and_a_larger_one_breaks_the_promise(tmp_path, by, kept):
    src, out = with_rivals(tmp_path / "src", by), tmp_path / "out"
    growth.grow(src, out, method="lemon", num_layers=4)
    assert growth.check(src, out, generate=NEW).generated.identical == 1
    tensors = load_file(out / "model.safetensors")
    tensors["embed_out.weight"][5] *= 1 - 2 * by
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    agreement = growth.check(src, out, generate=NEW)
    generated = agreement.generated
    assert generated.identical == generated.before == generated.agreeing == 0
    assert generated.apart == (0 if kept else 8 + 8 * NEW) and generated.kept is kept
    said = "kept, but for ties within" if kept else "BROKEN by"
    assert f"promised the same: {said}" in str(agreement)


def test_a_cache_that_forgets_is_told_and_fails_the_check(source, tmp_path, monkeypatch):
    growth.transfer(source, tmp_path / "out")
    assert growth.check(source, tmp_path / "out", generate=NEW).kept
    step = Retention.step

    def forgetful(self, x, state, **rotary):
        state.recurrent.mul_(0.5)
        return step(self, x, state, **rotary)

    monkeypatch.setattr(Retention, "step", forgetful)
    agreement = growth.check(source, tmp_path / "out", generate=NEW)
    assert agreement.limit is None and not agreement.kept
    assert agreement.generated.cached[0] < agreement.generated.limit < agreement.generated.cached[1]
    assert "the new model's CACHE gives other logits than the whole text" in str(agreement)


def test_a_model_whose_settings_turn_the_cache_off_writes_without_it(source, tmp_path, monkeypatch):
    growth.transfer(source, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_cache": False}))
    (tmp_path / "out" / "generation_config.json").unlink()
    monkeypatch.setattr(Retention, "step", None)
    agreement = growth.check(source, tmp_path / "out", generate=NEW)
    assert agreement.kept and agreement.generated.cached[1] is None
    assert str(agreement).endswith("; the new model's settings turn the cache off")


def test_nothing_ends_a_continuation_and_positions_bound_it(tmp_path):
    """Neither the tokens that a source's generation_config.json stops at nor those that it forbids."""
    src = neox(tmp_path / "src")
    ends, forbidden = list(range(128)), list(range(128, 250))
    GenerationConfig(eos_token_id=ends, suppress_tokens=forbidden).save_pretrained(src)
    growth.transfer(src, tmp_path / "out", mixers="attention")
    agreement = growth.check(src, tmp_path / "out", generate=1000)
    assert agreement.kept and agreement.generated.tokens == 16  # half of 32 positions
    assert agreement.generated.before == 16


def said(monkeypatch, capsys, *words):
    """What `growth check WORDS` prints."""
    monkeypatch.setattr(sys, "argv", ["growth", "check", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out.strip()


def test_the_card_and_the_json_have_the_figures(source, tmp_path, monkeypatch, capsys):
    pair = source, tmp_path / "out"
    growth.transfer(*pair)
    line = said(monkeypatch, capsys, *pair, "--generate")
    assert "of 8 greedy continuations of 16 tokens are identical" in line
    assert line in (tmp_path / "out" / "README.md").read_text()
    found = json.loads(said(monkeypatch, capsys, *pair, "--generate", "--json"))
    assert found["kept"] and found["generated"]["tokens"] == 16
    assert json.loads(said(monkeypatch, capsys, *pair, "--json"))["generated"] is None
