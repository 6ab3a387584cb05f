"""What callers of transformers' models expect of one: its arguments, its outputs, its Auto classes."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    StaticCache,
)

from lcikernels.models import LCIForCausalLM

PATTERNS = ["A", "R", "M", "S", "RAMS"]
TOLERANCE = {"rtol": 0, "atol": 1e-11}  # float64, logits of 1 to 10


def randomised(model):
    """No bias of 0, no gain of 1: what is left out shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("keyword", ["past", "cache_params", "labelz", "cu_seq_lens_q"])
def test_an_unknown_keyword_is_an_error_that_names_it(tiny, ids, keyword):
    model = tiny("R")
    for callee in (model, model.model):
        with pytest.raises(TypeError, match=keyword):
            callee(ids, **{keyword: None})


def test_the_old_name_of_the_cache_is_served_with_a_warning_as_transformers_serves_it(tiny, ids):
    model = tiny("RA")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), pytest.warns(FutureWarning, match="Use `cache` instead"):
        model(ids[:, :9], past_key_values=cache)
    with torch.no_grad():
        got = model(ids[:, 9:], cache=cache).logits
        torch.testing.assert_close(got, model(ids).logits[:, 9:], **TOLERANCE)


def test_attention_layers_give_their_weights_and_others_say_that_they_have_none(tiny, ids):
    model = randomised(tiny("RAMA"))
    with pytest.raises(ValueError, match="output_attentions must be False, or attn_implementation='eager'"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False where no layer is attention"):
        tiny("RM")(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True)
    assert [x.shape for x in out.attentions] == [(2, 4, 17, 17)] * 2
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert weights.triu(1).abs().max() == 0
    assert model(ids).attentions is None


def test_hidden_states_are_the_stream_before_every_block_and_after_the_norm(tiny, ids):
    model = randomised(tiny("RAMS"))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    first, *_ = model(ids, return_dict=False)
    assert torch.equal(first, out.logits)


def test_embeddings_in_the_place_of_tokens_give_the_same_text(tiny, ids):
    model = randomised(tiny("RAMS"))
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits, **TOLERANCE)
    want = model.generate(ids, max_new_tokens=5, do_sample=False)[:, 17:]
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=5, do_sample=False), want)


def test_a_batch_gives_what_its_rows_give(tiny, ids):
    model = randomised(tiny("RAMS"))
    rows = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(model(ids).logits, rows, **TOLERANCE)


def test_the_loss_of_part_of_a_batch_is_its_share_of_the_sum(tiny, ids):
    model = randomised(tiny("RA"))
    whole = model(ids, labels=ids).loss
    parts = sum(model(row[None], labels=row[None], num_items_in_batch=2 * 16).loss for row in ids)
    torch.testing.assert_close(parts, whole)


def test_a_vocabulary_that_is_resized_keeps_what_it_had(tiny, ids):
    model = randomised(tiny("RM"))
    want = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model(ids).logits.shape[-1] == 70
    torch.testing.assert_close(model(ids).logits[..., :64], want, **TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_chat_goes_on_where_it_was(tiny, ids, pattern):
    """Two turns on one cache, whose second holds what the first wrote, against everything anew."""
    model = randomised(tiny(pattern))
    options = {"max_new_tokens": 4, "do_sample": False}
    cache = DynamicCache(config=model.config)
    first = model.generate(ids[:, :9], cache=cache, **options)
    second = torch.cat([first, ids[:, 9:]], 1)
    got = model.generate(second, cache=cache, **options)
    assert torch.equal(got, model.generate(second, use_cache=False, **options))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_prefix_serves_many_ends(tiny, ids, pattern):
    model = randomised(tiny(pattern))
    options = {"max_new_tokens": 4, "do_sample": False}
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], cache=prefix)
    for end in (ids[:, 9:], ids[:, 9:].flip(1)):
        whole = torch.cat([ids[:, :9], end], 1)
        got = model.generate(whole, cache=copy.deepcopy(prefix), **options)
        assert torch.equal(got, model.generate(whole, use_cache=False, **options))


@pytest.mark.parametrize("pattern, kind", [("A", StaticCache), ("RAM", StaticCache), ("S", DynamicCache)])
def test_a_compiled_step_decodes_as_the_whole_model(tiny, ids, pattern, kind):
    torch._dynamo.reset()
    model = randomised(tiny(pattern))
    length = {"max_cache_len": 20} if kind is StaticCache else {}
    cache, step = kind(config=model.config, **length), torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = [model(ids[:, :14], cache=cache).logits]
        logits += [step(ids[:, i : i + 1], cache=cache).logits for i in range(14, 17)]
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, **TOLERANCE)


def test_a_cache_that_forgets_is_refused(tiny, ids):
    model = tiny("A")
    sliding = PreTrainedConfig(num_hidden_layers=1, sliding_window=4, layer_types=["sliding_attention"])
    with pytest.raises(ValueError, match="cache must be without sliding windows"):
        model(ids, cache=DynamicCache(config=sliding))


def test_another_kind_of_rotation_is_refused_however_it_got_there(tiny, ids):
    model = tiny("RA")
    model.config.rope_parameters = model.config.rope_parameters | {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type"):
        model(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rates_of_a_mamba_stay_in_float32(tiny, tmp_path, dtype):
    model = randomised(tiny("MS", torch.float32))
    model.save_pretrained(tmp_path / "a")
    half = LCIForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    half.save_pretrained(tmp_path / "b")
    again = LCIForCausalLM.from_pretrained(tmp_path / "b")
    for (name, x), y in zip(again.named_parameters(), model.parameters()):
        assert x.dtype == (torch.float32 if name.endswith("A_log") else dtype), name
        assert not name.endswith("A_log") or torch.equal(x, y)


LOAD = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "lcikernels" not in sys.modules
import torch
folder, blocked = sys.argv[1:]
if blocked == "blocked":
    sys.modules["lcikernels"] = None
try:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print(json.dumps([str(error)]))
else:
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    names = [type(x).__name__ for x in (model, base, config)]
    model.save_pretrained(folder + "-again")
    print(json.dumps([*names, model(torch.tensor([[1, 2, 3]])).logits.double().sum().item()]))
"""


def test_a_checkpoint_loads_where_nobody_imported_this_package(tiny, tmp_path):
    """In an interpreter of its own; without the package, the error says what to install."""
    model = randomised(tiny("RAMS", torch.float32))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(folder), kind],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        for kind in ("there", "blocked")
    ]
    there, blocked = (run.communicate() for run in runs)
    *names, total = json.loads(there[0].splitlines()[-1]) if there[0] else pytest.fail(there[1])
    assert names == ["LCIForCausalLM", "LCIModel", "LCIConfig"]
    want = model(torch.tensor([[1, 2, 3]])).logits.double().sum().item()
    assert total == pytest.approx(want, rel=1e-5)
    assert "pip install lcikernels[growth]" in json.loads(blocked[0].splitlines()[-1])[0]
    again = json.loads((tmp_path / "model-again" / "config.json").read_text())
    assert {file.name for file in (tmp_path / "model-again").glob("*.py")} == {"modeling_lci.py"}
    assert again["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_lci.py")
    }


@pytest.mark.parametrize("trust", [None, False, True])
def test_where_the_package_is_imported_its_own_classes_are_used(tiny, tmp_path, trust):
    tiny("R", torch.float32).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is LCIForCausalLM
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
    assert config.pattern == "R"
