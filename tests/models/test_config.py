import math

import pytest
import torch

from lcikernels.models import LCIConfig


@pytest.mark.parametrize("pattern", ["", "RA", "RAMR", "RAX", "ram"])
def test_a_pattern_of_another_length_or_letter_is_refused(tiny_config, pattern):
    got = f"got '{pattern}' with {len(pattern)} letters"
    message = f"pattern must be num_hidden_layers=3 letters out of A .* R .* M .* S .* {got}"
    with pytest.raises(ValueError, match=message):
        tiny_config(pattern, num_hidden_layers=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 5, "retention_num_heads": 4}, "num_attention_heads must be a .*, got 5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a divisor of .*, got 0"),
        ({"retention_num_heads": 3}, "retention_num_heads must be a divisor of .*, got 3"),
        (
            {"rope_parameters": {"rope_type": "axial"}},
            r"rope_parameters\['rope_type'\] must be .*, got 'axial'",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "the 8 of a head of mixer A, got 12 dims"),
        ({"mamba2_num_heads": 3}, r"mamba2_num_heads must be a divisor of expand \* hidden_size=64, got 3"),
        ({"mamba2_n_groups": 3, "mamba2_num_heads": 4}, "mamba2_n_groups .* mamba2_num_heads=4, got 3"),
        ({"mamba2_state_size": 0}, "mamba2_state_size must be at least 1, got 0"),
        ({"time_step_limit": [0.1, 0.01]}, r"0 <= least <= most, got \(0.1, 0.01\)"),
        ({"time_step_limit": [0.1]}, r"0 <= least <= most, got \(0.1,\)"),
        ({"retention_log_decay": [-1.0] * 3}, "log_decay must be as many .* retention_num_heads=4, got 3"),
        ({"retention_log_decay": [-1.0, 0.0, 1e-9, -2.0]}, "retention_log_decay .* each <= 0, got 1e-09"),
        ({"retention_log_decay": [-1.0] * 3 + [-math.inf]}, "finite numbers of float32, .* got -inf"),
        ({"retention_log_decay": [-1e39] + [-1.0] * 3}, r"finite numbers of float32, .* got -1e\+39"),
        ({"retention_log_decay": [math.nan] + [-1.0] * 3}, "finite numbers of float32, .* got nan"),
        ({"head_dim": 5, "rope_parameters": {}}, "the 5 of a head of mixer A, got 5 dims"),
        ({"norm": "batch"}, "norm must be 'layer' or 'rms', got 'batch'"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0, and finite, got -1.0"),
        ({"norm_eps": math.nan}, "norm_eps must be at least 0, and finite, got nan"),
        ({"layer_norm_eps": -1.0}, "norm_eps must be at least 0, and finite, got -1.0"),
        ({"norm_placement": "after"}, "norm_placement must be 'before' or 'around' or 'inside', got 'after'"),
        ({"zero_centered_norms": True}, "zero_centered_norms must be False where norm is 'layer', got True"),
        ({"hidden_act": "gelo"}, "hidden_act must be an activation that transformers knows, got 'gelo'"),
        ({"qk_norm": "heads"}, "qk_norm must be None or 'head' or 'all', got 'heads'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_attention_heads=4, got 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a divisor of num_attention_heads=4, got 0"),
        ({"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"hidden_size": 0, "head_dim": 8}, "hidden_size must be at least 1, got 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
        ({"retention_num_kv_heads": 3}, "retention_num_kv_heads must be a divisor of .*=4, got 3"),
        ({"retention_head_dim": 0}, "retention_head_dim must be at least 1, got 0"),
        (
            {"retention_learned_decay": True, "retention_log_decay": [-1.0, -1.0, 0.0, -1.0]},
            "retention_log_decay must be below 0 in every head with retention_learned_decay, got 0.0",
        ),
        (
            {"expand": 1.01},
            r"expand must be such that expand \* hidden_size=32 is a whole number .*, got 1.01",
        ),
        ({"expand": 0}, "expand must be such that .* is a whole number of channels, got 0"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type must be 'rope' or .*, got 'alibi'"),
        ({"no_rope_layers": [3]}, r"no_rope_layers must be layers from 0 to 2, each once, got \[3\]"),
        ({"no_rope_layers": [1, 1]}, r"no_rope_layers must be .*, each once, got \[1, 1\]"),
        ({"embedding_scale": 0.0}, "embedding_scale must be above 0, and finite, got 0.0"),
        ({"residual_scale": -1.0}, "residual_scale must be above 0, and finite, got -1.0"),
        ({"logits_scale": math.inf}, "logits_scale must be above 0, and finite, got inf"),
        ({"attention_scale": 0}, "attention_scale must be above 0, and finite, got 0"),
        ({"attention_softcap": 0.0}, "attention_softcap must be above 0, and finite, got 0.0"),
        ({"final_softcap": math.nan}, "final_softcap must be above 0, and finite, got nan"),
        (
            {"rope_parameters": {"rope_theta": 0.0}},
            r"rope_parameters\['rope_theta'\] must be a number above 0",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            r"rope_parameters\['factor'\] must be a number above 0, got None",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            r"rope_parameters\['high_freq_factor'\] must be a number above 0, got None",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0]}},
            r"rope_parameters\['long_factor'\] must be 4 numbers above 0, .* of mixer A, got \[1.0\]",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor must be such that more than 2 dims rotate with 'dynamic', got 2 dims",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}},
            r"rope_parameters\['full_attention'\] must be given, for the pattern has such layers, got None",
        ),
        (
            {"rope_parameters": {"full_attention": "default"}},
            r"rope_parameters\['full_attention'\] must be a dict, got 'default'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_name_of_its_field(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("RAS", **changes)


@pytest.mark.parametrize("window", [None, 0, 1])
def test_a_window_must_hold_two_tokens_where_there_is_one(tiny_config, window):
    with pytest.raises(ValueError, match="sliding_window must be at least 2 where the pattern has W, got"):
        tiny_config("RW", sliding_window=window)
    assert tiny_config("RA", sliding_window=window).layer_types == ["recurrent", "full_attention"]


def test_what_no_layer_of_the_pattern_has_is_nobodys(tiny_config):
    config = tiny_config("M", num_attention_heads=5, retention_num_heads=3, num_key_value_heads=2)
    assert config.head_sizes == config.rotary_dims == {}
    nested = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 7.0}}
    config = tiny_config("WRA", sliding_window=4, rope_parameters=nested)
    assert [config.rope_of(letter)["rope_theta"] for letter in "WRA"] == [7.0, 5.0, 5.0]
    assert config.layer_types == ["sliding_attention", "recurrent", "full_attention"]
    only = tiny_config("RR", rope_parameters={"full_attention": {"rope_theta": 5.0}})
    assert only.rope_parameters == {"full_attention": {"rope_theta": 5.0, "rope_type": "default"}}


def test_defaults_are_resolved_and_survive_json(tmp_path, tiny_config):
    config = tiny_config("RAMS", hidden_size=40)
    assert (config.head_dim, config.retention_num_heads, config.time_step_rank) == (10, 4, 3)
    assert (config.mamba2_num_heads, config.time_step_limit) == (5, (0.0, math.inf))
    assert LCIConfig(hidden_size=768).mamba2_num_heads == 24
    assert LCIConfig(num_hidden_layers=5).pattern == "RRRRR"
    config.save_pretrained(tmp_path)
    assert LCIConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    layer_types = ["recurrent", "full_attention", "recurrent", "recurrent"]
    assert LCIConfig.from_pretrained(tmp_path).layer_types == layer_types


def test_retention_may_have_its_own_number_of_heads(tiny):
    model = tiny("RA", retention_num_heads=2)
    assert model.model.layers[0].mixer.log_decay.shape == (2,)
    assert model.config.rotary_dims == {"A": 4, "R": 8}


def test_decays_are_by_head_number_unless_they_are_listed(tiny, ids):
    by_number = tiny("RA")
    listed = by_number.model.layers[0].mixer.log_decay.tolist()
    with torch.no_grad():
        want = by_number(ids).logits
        assert torch.equal(tiny("RA", retention_log_decay=listed)(ids).logits, want)
        for h in range(4):
            others = listed[:h] + [-0.5] + listed[h + 1 :]
            moved = tiny("RA", retention_log_decay=others)(ids).logits - want
            assert moved.abs().max() > 1e-3, h


def test_decays_of_a_model_without_retention_are_nobodys(tiny_config):
    assert tiny_config("AMS", retention_log_decay=[-1.0]).retention_log_decay == [-1.0]
