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
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("RAS", **changes)


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
