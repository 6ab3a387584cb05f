import math

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
