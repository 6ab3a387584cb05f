import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lcikernels.layers.retention import retnet_log_decay
from lcikernels.models import LCIConfig, LCIForCausalLM, LCIModel

FRAME = ("mixer_norm", "mlp_norm", "mlp.up_proj", "mlp.down_proj")
NORMS_AND_MLP = {f"{module}.{name}" for module in FRAME for name in ("weight", "bias")}
MIXERS = {
    "A": {f"mixer.{m}_proj.{p}" for m in "qkvo" for p in ("weight", "bias")},
    "R": {f"mixer.{m}_proj.{p}" for m in "qkvgo" for p in ("weight", "bias")},
    "M": {
        *("mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.x_proj.weight"),
        *("mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.A_log", "mixer.D", "mixer.out_proj.weight"),
    },
    "S": {
        *("mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_bias", "mixer.A_log"),
        *("mixer.D", "mixer.norm.weight", "mixer.out_proj.weight"),
    },
}


def test_the_names_on_disk_are_the_names_in_memory(tmp_path, tiny):
    tiny("RAMS").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        got = set(file.keys())
    want = {"model.embed_tokens.weight", "model.norm.weight", "model.norm.bias", "lm_head.weight"}
    for i, letter in enumerate("RAMS"):
        want |= {f"model.layers.{i}.{name}" for name in NORMS_AND_MLP | MIXERS[letter]}
    assert got == want == set(tiny("RAMS").state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_through_the_auto_classes_with_the_same_logits(tmp_path, tiny, ids, tied):
    model = tiny("RAMS", torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is LCIForCausalLM and type(AutoConfig.from_pretrained(tmp_path)) is LCIConfig
    for (name, got), (_, want) in zip(loaded.named_parameters(), model.named_parameters()):
        assert torch.equal(got, want), name
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied

    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LCIModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_missing_tensors_are_initialised_and_present_ones_kept(tmp_path, tiny):
    model = tiny("MRS", torch.float32)
    kept = {name: x for name, x in model.state_dict().items() if ".mixer." not in name}
    model.save_pretrained(tmp_path, state_dict=dict(kept))
    loaded, info = LCIForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(model.state_dict()) - set(kept)
    assert all(torch.equal(loaded.state_dict()[name], x) for name, x in kept.items())
    mamba, retention, mamba2 = (layer.mixer for layer in loaded.model.layers)
    assert torch.equal(mamba.A_log, torch.arange(1.0, 17.0).log().expand(64, 16))
    assert torch.equal(retention.log_decay, retnet_log_decay(4))
    assert torch.equal(mamba2.norm.weight, torch.ones(64)) and 0 <= mamba2.A_log <= math.log(16)


def test_bfloat16_models_keep_their_decays_in_float32(tmp_path, tiny, ids):
    model = tiny("RAMS", torch.float32)
    model.save_pretrained(tmp_path)
    want = model(ids).logits
    for half in (LCIForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16)):
        assert half.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(half.model.layers[0].mixer.log_decay, retnet_log_decay(4))
        logits = half(ids).logits
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - want).norm() < 0.05 * want.norm()


def test_the_decays_a_config_lists_are_saved_loaded_and_kept_exactly(tmp_path, tiny, ids):
    given = [-1 / 3, -0.1, 0.0, -0.1]
    model, want = tiny("RA", torch.float32, retention_log_decay=given), torch.tensor(given)
    model.save_pretrained(tmp_path)
    loaded = LCIForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.retention_log_decay == given
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        fresh = LCIForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for kept in (fresh, loaded.to(dtype)):
            assert torch.equal(kept.model.layers[0].mixer.log_decay, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rates_and_steps_of_a_mamba_stay_in_float32(tiny, tmp_path, dtype):
    """They are saved and loaded as they were."""
    model = tiny("MS", torch.float32)
    model.save_pretrained(tmp_path / "a")
    half = LCIForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    half.save_pretrained(tmp_path / "b")
    again = LCIForCausalLM.from_pretrained(tmp_path / "b")
    exact = {"0.mixer.A_log", "0.mixer.dt_proj.bias", "1.mixer.A_log", "1.mixer.dt_bias"}
    for (name, x), y in zip(again.named_parameters(), model.parameters()):
        kept = name.removeprefix("model.layers.") in exact
        assert x.dtype == (torch.float32 if kept else dtype), name
        assert torch.equal(x, y) == kept, name


def test_a_bfloat16_mamba_decodes_and_trains_beside_its_float32_rates(tiny, tmp_path, ids):
    tiny("MS", torch.float32).save_pretrained(tmp_path)
    model = LCIForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model(ids, labels=ids).loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in model.parameters())
    with torch.no_grad():
        whole, past = model(ids).logits, model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], cache=past.cache).logits
    assert last.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([past.logits, last], 1), whole)


LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "lcikernels" not in sys.modules
folder = sys.argv[1]
said = {}
sys.modules["lcikernels"] = None
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    said["missing"] = str(error)
del sys.modules["lcikernels"]
classes = (AutoModelForCausalLM, AutoModel, AutoConfig)
model, *others = (auto.from_pretrained(folder, trust_remote_code=True) for auto in classes)
said["names"] = [type(x).__name__ for x in (model, *others)]
said["logits"] = model(torch.tensor([[1, 2, 3]])).logits.double().sum().item()
model.save_pretrained(folder + "-again")
print(json.dumps(said))
"""


def test_a_checkpoint_loads_where_nobody_imported_this_package(tiny, tmp_path):
    """In an interpreter of its own; without the package, one line says what to install."""
    model, folder = tiny("RAMS", torch.float32), tmp_path / "model"
    model.save_pretrained(folder)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    assert "pip install 'lcikernels[growth]'" in said["missing"] and "\n" not in said["missing"]
    assert said["names"] == ["LCIForCausalLM", "LCIModel", "LCIConfig"]
    want = model(torch.tensor([[1, 2, 3]])).logits.double().sum().item()
    assert said["logits"] == pytest.approx(want, rel=1e-5)
    again = json.loads((tmp_path / "model-again" / "config.json").read_text())
    assert {file.name for file in (tmp_path / "model-again").glob("*.py")} == {"modeling_lci.py"}
    assert again["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_lci.py")
    }


@pytest.mark.parametrize("trust", [None, False, True])
def test_where_the_package_is_imported_its_own_classes_are_used(tiny, tmp_path, trust, capfd):
    tiny("R", torch.float32).save_pretrained(tmp_path)
    capfd.readouterr()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is LCIForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is LCIConfig
    out, err = capfd.readouterr()
    assert not out and "code" not in err and "arning" not in err


def test_a_config_is_pushed_with_the_file_that_leads_here(tmp_path, tiny_config, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        LCIConfig, "push_to_hub", lambda self, *args, **options: pushed.append((args, options))
    )
    tiny_config("R").save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert pushed == [(("mine",), {"private": True})] and (tmp_path / "mine" / "modeling_lci.py").exists()


def test_layers_that_wait_on_the_disk_give_the_same_logits(tiny, tmp_path, ids):
    model = tiny("RAMS", torch.float32)
    model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    parts |= {f"model.layers.{i}": "disk" for i in range(4)}
    options = {"device_map": parts, "offload_folder": str(tmp_path / "waiting")}
    loaded = LCIForCausalLM.from_pretrained(tmp_path / "model", **options)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **greedy), model.generate(ids, **greedy))
