"""However copies are parted, their readers see what readers of the originals did."""

import pytest
import torch

from growth.apply import add_noise, read, unseen, write
from growth.architecture import Wire
from growth.learned.starts import added
from growth.maps import copies

PARTINGS = ("spread", "first", "pairs", "blocks")
INDICES = {
    "whole factor": (0, 1, 2, 0, 1, 2),
    "three times, side by side": (0, 0, 0, 1, 1, 1),
    "a part again": (0, 1, 2, 3, 0, 1),
    "at random": (0, 1, 2, 2, 2, 0, 2),
    "groups of heads, shared out in turn": (0, 1, 2, 3, 0, 1, 2, 3, 1, 0),
    "some are no copies": (0, -1, 1, 2, 0, 1, 2, -1),
    "in no order": (2, -1, 0, 2, 1, 1, 0, 2),
    "no copies at all": (1, 0, -1),
}


def copied(index, width, **how):
    return copies(index, Wire(max(index) + 1, width), **how)


@pytest.mark.parametrize("parting", PARTINGS)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("width", [1, 3])
def test_read_and_noise_leave_what_readers_see(index, width, parting):
    of = copied(index, width, parting=parting)
    writers = [None, *(copied(other, 2) for other in INDICES.values())]
    x = torch.randn(of.sources * width, dtype=torch.float64)
    wide = write(of, x)
    for writes in writers:
        weight = torch.randn(2 * len(writes.index) if writes else 5, len(x), dtype=torch.float64)
        assert torch.allclose(read(of, weight, writes) @ wide, weight @ x)
    noise = torch.zeros(7, len(wide), dtype=torch.float64)
    add_noise(of, noise, 1.0, torch.Generator().manual_seed(0))
    hidden = unseen(of, torch.randn(7, len(wide), dtype=torch.float64))
    assert (noise @ wide).abs().max() < 1e-12 and (hidden @ wide).abs().max() < 1e-12
    assert torch.allclose(unseen(of, hidden.clone()), hidden)
    free = torch.tensor([s < 0 or index.count(s) > 1 for s in index]).repeat_interleave(width)
    if parting == "pairs":  # the last of three has none to pair with
        free &= (noise != 0).any(0)
    assert (noise[:, ~free] == 0).all() and (noise[:, free] != 0).all()


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_blocks_of_rows_are_read_as_all_rows_are(index):
    of, writes = copied(index, 2, parting="blocks"), copied((0, 1, 0, 2, 1, 0), 3)
    weight = torch.randn(18, of.sources * 2, dtype=torch.float64)
    whole = read(of, weight, writes)
    for start in range(0, 18, 5):
        rows = slice(start, min(start + 5, 18))
        assert torch.equal(read(of, weight[rows], writes, rows), whole[rows])


@pytest.mark.parametrize("parting", PARTINGS)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_maps_that_learn_start_where_readers_see_the_same(index, parting, noise):
    of = added(copied(index, 2, parting=parting, noise=noise), torch.Generator().manual_seed(0)).double()
    x, weight = (
        torch.randn(2 * len({*index} - {-1})).double(),
        torch.randn(4, 2 * len({*index} - {-1})).double(),
    )
    with torch.no_grad():
        torch.testing.assert_close(of.read(weight) @ of.write(x), weight @ x, rtol=1e-6, atol=1e-6)


def test_whole_factors_make_diagonal_blocks():
    of, writes = copied((0, 1, 0, 1), 1, parting="blocks"), copied((0, 1, 2, 0, 1, 2), 1)
    small = torch.randn(3, 2)
    assert torch.equal(read(of, small.repeat(2, 1), writes), torch.block_diag(small, small))
    assert torch.equal(read(of, small), torch.cat([small, small], 1) / 2)  # rows that do not grow


def test_a_first_copy_gives_up_what_the_others_are_given():
    of = copied((0, 1, 0, 1, 0), 1, parting="first")
    assert of.share == (1, 1, 0, 0, 0)
    fresh = torch.randn(4, 5)
    made = unseen(of, fresh.clone())
    assert torch.equal(made[:, 2:], fresh[:, 2:])
    assert torch.allclose(made[:, 0], -fresh[:, 2] - fresh[:, 4]) and torch.equal(made[:, 1], -fresh[:, 3])


def test_pairs_of_copies_differ_by_their_sign():
    of = copied((0, 1, 0, 1, 0), 1, parting="pairs")
    fresh = torch.randn(4, 5)
    made = unseen(of, fresh.clone())
    assert torch.equal(made[:, :2], fresh[:, :2]) and torch.equal(made[:, 2:4], -fresh[:, :2])
    assert (made[:, 4] == 0).all()
