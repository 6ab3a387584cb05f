import pytest
import torch

from lcikernels.models.cache import RecurrentLayer


@pytest.fixture
def layer() -> RecurrentLayer:
    """After 7 tokens of 3 rows; each state holds its row's number."""
    layer = RecurrentLayer()
    rows = torch.arange(3.0)
    layer.update_conv_state(rows[:, None, None].expand(3, 4, 3).clone())
    layer.update_recurrent_state(rows[:, None, None, None].expand(3, 2, 4, 4).clone(), tokens=7)
    return layer


def rows(layer: RecurrentLayer) -> list[float]:
    conv, recurrent = layer.conv_states[0].amax((1, 2)), layer.recurrent_states[0].amax((1, 2, 3))
    assert torch.equal(conv, recurrent)
    return recurrent.tolist()


def test_rows_follow_the_beams(layer):
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert rows(layer) == [2, 0, 0]
    layer.batch_repeat_interleave(2)
    assert rows(layer) == [2, 2, 0, 0, 0, 0]
    layer.batch_select_indices(torch.tensor([4, 1]))
    assert rows(layer) == [0, 2]
    assert layer.get_seq_length() == 7 and layer.get_mask_sizes(5) == (12, 0)


def test_reset_forgets_states_and_length(layer):
    layer.reset()
    assert layer.get_seq_length() == 0 and not layer.has_previous_state[0]
    assert rows(layer) == [0, 0, 0]


def test_a_state_cannot_rewind_nor_hold_keys(layer):
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        layer.crop(-1)
    layer.crop(0)
    with pytest.raises(ValueError, match="layer_idx must be that of an attention layer"):
        layer.update(torch.zeros(1), torch.zeros(1))
