import pytest
import torch
from large_checkpoint import BLOCK, FAMILIES, shapes, sized, spread, write
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_made_in_pieces_is_whole_and_every_parameter_of_it_random(tmp_path, family):
    config = sized(0.025, hidden_size=384, vocab_size=12000, family=family)
    tensors = shapes(config)
    assert max(shape.numel() for shape in tensors.values()) > BLOCK and config.num_hidden_layers == 2
    folder = write(tmp_path / family, config, shard_bytes=11 * 10**6)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3 and all(file.stat().st_size < 11.1e6 for file in files)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    seen = []
    for name, x in model.state_dict().items():
        x = x.float()
        assert x.shape == tensors[name] and x.unique().numel() > 40, name
        mean, std = spread(name)
        assert abs(x.mean() - mean) < 0.2 * std and 0.7 * std < x.std() < 1.3 * std, name
        seen.append(x.flatten()[:384])
    assert not any(torch.equal(x, y) for i, x in enumerate(seen) for y in seen[:i])


def test_six_gigabytes_are_22_layers_of_3072():
    config = sized(6.0)
    assert config.num_hidden_layers == 22 and config.intermediate_size == 8192
    assert (config.num_attention_heads, config.num_key_value_heads) == (24, 8)
    total = 2 * sum(shape.numel() for shape in shapes(config).values())
    assert abs(total / 6e9 - 1) < 0.01
