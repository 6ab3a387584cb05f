"""LiGO's map of all layers' weights is a product of block-diagonal matrices and permutations (Monarch)."""

import pytest
import torch
from checkpoints import FAMILIES
from safetensors.torch import load_file, save_file

from growth.checkpoint import Checkpoint
from growth.expand import Expand
from growth.learned.maps import LearnedMaps, dense
from growth.maps import Maps
from growth.methods import Ligo
from growth.plan import Source
from growth.sizes import Sizes, resized

TINY = {
    "gpt_neox": {"intermediate_size": 12, "num_hidden_layers": 2},
    "gpt2": {"n_inner": 12, "n_layer": 2},
    "bert": {"intermediate_size": 12, "num_hidden_layers": 2},
}
WIDTH = {"gpt2": {"n_embd": 8, "n_head": 2}}
USUAL = {"hidden_size": 8, "num_attention_heads": 2}


@pytest.fixture(params=TINY)
def grown(request, tmp_path):
    """A source of 2 layers of 8, what it is to become, 3 of 12, and maps whose every number is random."""
    name = request.param
    folder = FAMILIES[name](tmp_path / "src", torch.float64, **TINY[name], **WIDTH.get(name, USUAL))
    held = folder / "model.safetensors"  # float64 of numbers that float32 holds, as operators do
    save_file({name: x.float().double() for name, x in load_file(held).items()}, held, {"format": "pt"})
    source, method = Source(Checkpoint(folder)), Ligo(start="published", ties="untied")
    config = resized(source.model, Sizes(hidden=12, layers=3), method.layers)
    old, new = source.model.architecture, source.family.model(config, source.model.parts).architecture
    operator = method.operator(source, old, new, method.maps(old, new), seed=0).double()
    for i, x in enumerate(operator.parameters()):
        torch.nn.init.normal_(x, generator=torch.Generator().manual_seed(i))
    depth = {
        name: tuple(tuple(enumerate(row)) for row in operator.depth[name.replace(".", "/")].tolist())
        for name in operator.start.depth
    }
    return source, old, new, Maps(operator.start.wires, depth, mixed=operator.start.mixed), operator


def interleaved(first: int, second: int) -> torch.Tensor:
    """The permutation P with P (x (x) y) = y (x) x, x of `first` entries and y of `second`."""
    order = torch.arange(first * second).view(first, second).T.flatten()
    return torch.eye(first * second, dtype=torch.float64)[order]


def factors(weight, maps, old):
    """R and L, both block-diagonal: a block of R widens a new layer, one of L mixes an entry of all layers.

    A block of R is itself a product, of what widens the rows and what widens the columns.
    """
    rows = maps.depth[weight.name]
    mix = torch.tensor([[w for _, w in row] for row in rows], dtype=torch.float64)
    sizes, blocks = [old.wires[wire].size for wire in weight.wires], []
    for layer in range(len(rows)):
        sides = []
        for axis, (wire, size) in enumerate(zip(weight.wires, sizes)):
            of = maps.of(wire, layer)
            side = "read_matrix" if weight.reads and axis == len(sizes) - 1 else "write_matrix"
            eye = torch.eye(size, dtype=torch.float64)
            sides.append(eye if of is None else getattr(dense(of, size), side).detach().contiguous())
        blocks.append(torch.kron(*sides) if len(sides) == 2 else sides[0])
    entries = blocks[0].shape[1]
    return torch.block_diag(*blocks), torch.block_diag(*[mix] * entries), mix, entries, sizes


def test_width_and_depth_are_block_diagonal_factors_and_a_permutation(grown):
    """vec(new) = R P' L P vec(old), of every weight of layers, is what the engine writes and what learns."""
    source, old, new, maps, operator = grown
    for name, weight in old.layered.items():
        R, L, mix, entries, _ = factors(weight, maps, old)
        P, Q = interleaved(mix.shape[1], entries), interleaved(entries, mix.shape[0])
        narrow = torch.cat([source.read(name, j).flatten() for j in range(mix.shape[1])])
        torch.testing.assert_close(Q @ L @ P, torch.kron(mix, torch.eye(entries).double()), rtol=0, atol=0)
        got = (R @ (Q @ (L @ (P @ narrow)))).view(mix.shape[0], *new.shape(weight))
        for layer in range(mix.shape[0]):
            expand = Expand(None, layer, maps, old, new, seed=0)
            written = expand.expanded(expand.mixed(source, weight), weight)
            learned = operator.wide([weight], layer)[0]
            largest = written.abs().max().item()
            assert (got[layer] - written).abs().max() < 1e-12 * max(largest, 1.0), name
            assert (got[layer] - learned).abs().max() < 1e-12 * max(largest, 1.0), name


def test_the_factors_have_fewer_numbers_than_their_product(grown):
    """Of L1 x m x n to L2 x M x N: L2 M N m n + m n L1 L2 instead of L1 L2 M N m n; by its rows and then its
    columns a block of R has M m n + M N n, not M N m n."""
    _, old, new, maps, _ = grown
    for weight in (weight for weight in old.layered.values() if weight.reads):
        R, L, mix, entries, (m, n) = factors(weight, maps, old)
        (M, N), (L2, L1) = new.shape(weight), mix.shape
        assert all(maps.of(wire, 0) is not None for wire in weight.wires)
        product = R @ torch.kron(mix, torch.eye(entries).double())
        assert product.count_nonzero() <= L1 * L2 * M * N * m * n
        # the old units stay, so that [I; C] has m + (M - m) m numbers that are not zero
        sides = [m + (M - m) * m, n + (N - n) * n]
        assert R.count_nonzero() == L2 * sides[0] * sides[1] < L2 * M * N * m * n
        assert L.count_nonzero() == entries * L1 * L2
        assert R.count_nonzero() + L.count_nonzero() < product.count_nonzero()
        of = [dense(maps.of(wire, 0), size) for wire, size in zip(weight.wires, (m, n))]
        write, read = of[0].write_matrix.detach(), of[1].read_matrix.detach().contiguous()
        rows, columns = torch.kron(write, torch.eye(n).double()), torch.kron(torch.eye(M).double(), read)
        torch.testing.assert_close(columns @ rows, R[: M * N, : m * n], rtol=0, atol=1e-12)
        assert rows.count_nonzero() + columns.count_nonzero() == sides[0] * n + M * sides[1]


def test_the_maps_are_those_of_a_real_model(grown):
    source, old, new, maps, operator = grown
    assert isinstance(operator, LearnedMaps) and len(maps.mixed) == len(old.layered)
    assert (old.layers, new.layers) == (2, 3) and new.wires["residual"].size == 12
    assert {weight.reads for weight in old.layered.values()} == {True, False}
