from functools import partial

import pytest
import torch
from devices import on_device, why_not
from memory import Memory
from tolerance import assert_agrees

from lcikernels import kronecker_expand
from lcikernels.backends import TABLES
from lcikernels.ops.kronecker_expand import blocked
from lcikernels.ops.kronecker_expand.reference import kronecker_expand as reference

# L1, L2 (None: no depth), m, n, M, N
SHAPES = {
    "one layer of one number": (1, 1, 1, 1, 1, 1),
    "odd everything": (3, 5, 5, 7, 11, 13),
    "wider outside than inside": (2, 4, 8, 3, 9, 20),
    "no mix of layers": (4, None, 6, 5, 8, 9),
    "narrower": (2, 3, 9, 8, 4, 5),
    "fewer layers": (5, 2, 4, 4, 6, 6),
}
SHARED = {"shared maps": (True, True), "own maps": (False, False), "shared write": (True, False)}


def inputs(L1, L2, m, n, M, N, shared, dtype=torch.float32):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    lead = [() if one else (L1,) for one in shared]
    whole = {"weight": leaf(L1, m, n), "write": leaf(*lead[0], M, m), "read": leaf(*lead[1], N, n)}
    return whole if L2 is None else whole | {"depth": leaf(L2, L1)}


@pytest.fixture(params=TABLES["kronecker_expand"])
def expand(request):
    if why := why_not("kronecker_expand", request.param):
        pytest.skip(why)
    return on_device(kronecker_expand, request.param)


@pytest.fixture(params=TABLES["kronecker_expand"])
def expand_float64(request):
    if why := why_not("kronecker_expand", request.param, torch.float64):
        pytest.skip(why)
    return on_device(kronecker_expand, request.param)


@pytest.fixture(params=TABLES["kronecker_expand"])
def expand_16_bits(request, dtype):
    if why := why_not("kronecker_expand", request.param, dtype):
        pytest.skip(why)
    return on_device(kronecker_expand, request.param)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(expand, shape, shared, poisoned):
    assert_agrees(expand, reference, **inputs(*shape, shared))


ADDED = SHAPES | {"none on one side": (2, 3, 4, 5, 0, 3), "none at all": (2, 3, 4, 5, 0, 0)}


@pytest.mark.parametrize("shape", ADDED.values(), ids=ADDED)
def test_old_units_stay_where_units_are_added(expand, shape, poisoned):
    whole = {name: u if u.numel() else u.detach() for name, u in inputs(*shape, (True, True)).items()}
    assert_agrees(partial(expand, added=True), partial(reference, added=True), **whole)
    depth = whole.get("depth")
    m, n = whole["weight"].shape[1:]
    kept = expand(**whole, added=True)[:, :m, :n]
    mixed = whole["weight"] if depth is None else torch.einsum("ij,jmn->imn", depth, whole["weight"])
    torch.testing.assert_close(kept, mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M, N", [(50, 20), (20, 60)])
def test_added_units_of_16_bits_are_computed_in_float32(expand_16_bits, M, N, dtype):
    whole = inputs(3, 4, 40, 30, M, N, (True, True), dtype)
    assert_agrees(partial(expand_16_bits, added=True), partial(reference, added=True), **whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_16_bit_inputs_are_computed_in_float32(expand_16_bits, shared, dtype):
    assert_agrees(expand_16_bits, reference, **inputs(3, 4, 40, 30, 50, 60, shared, dtype))


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_float32_may_be_multiplied_in_tf32_where_torch_may(expand, shared, poisoned):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        # tf32 has as many bits as float16
        assert_agrees(expand, reference, products=torch.float16, **inputs(3, 4, 40, 30, 150, 160, shared))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_blocks_of_rows_and_columns_make_no_difference(shared, monkeypatch, poisoned):
    monkeypatch.setattr(blocked, "CACHE", 0)
    monkeypatch.setattr(blocked, "SHARE", 0)
    monkeypatch.setattr(blocked, "COLUMNS", 4)
    op = partial(kronecker_expand, backend="torch")
    assert_agrees(op, reference, **inputs(3, 5, 6, 7, 37, 9, shared))


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("mixes_first", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("L2", [2, 5, None])
def test_layers_or_rows_make_no_difference(L2, added, mixes_first, small_blocks, monkeypatch, poisoned):
    monkeypatch.setattr(blocked.Problem, "mixes_first", property(lambda problem: mixes_first))
    if small_blocks:
        monkeypatch.setattr(blocked, "CACHE", 0)
        monkeypatch.setattr(blocked, "SHARE", 0)
        monkeypatch.setattr(blocked, "COLUMNS", 4)
    op, truth = (partial(x, added=added) for x in (partial(kronecker_expand, backend="torch"), reference))
    assert_agrees(op, truth, **inputs(3, L2, 20, 7, 37, 9, (True, True)))


@pytest.mark.parametrize(
    "L1, L2, added", [(6, 12, False), (6, 12, True), (12, 12, False), (12, 12, True), (12, 1, True)]
)
def test_the_forward_takes_little_more_than_its_output(L1, L2, added):
    weight, depth = torch.empty(L1, 512, 512, device="meta"), torch.empty(L2, L1, device="meta")
    rows = 256 if added else 768
    write, read = (torch.empty(rows, 512, device="meta") for _ in range(2))
    with Memory() as memory:
        out = blocked.forward(weight, write, read, depth, added)
    held = sum(u.untyped_storage().nbytes() for u in (weight, write, read, depth))
    assert memory.most - held <= 1.1 * out.untyped_storage().nbytes()


@pytest.mark.parametrize("shared, added", [*((x, False) for x in SHARED.values()), ((True, True), True)])
def test_gradcheck(expand_float64, shared, added):
    whole = inputs(2, 3, 3, 2, 4, 5, shared, torch.float64)

    def run(*values):
        return expand_float64(**dict(zip(whole, values)), added=added)

    assert torch.autograd.gradcheck(run, tuple(whole.values()))


def test_it_is_the_kronecker_product_of_the_paper(expand_float64):
    L1, L2, m, n, M, N = 2, 3, 3, 4, 5, 6
    whole = inputs(L1, L2, m, n, M, N, (False, False), torch.float64)
    widths = torch.block_diag(*(torch.kron(*pair) for pair in zip(whole["write"], whole["read"])))
    depth = torch.kron(whole["depth"], torch.eye(M * N, dtype=torch.float64))
    expected = (depth @ widths @ whole["weight"].flatten()).view(L2, M, N)
    torch.testing.assert_close(expand_float64(**whole), expected)


def test_a_gradient_of_the_weight_costs_nothing_where_nobody_asks(expand):
    whole = inputs(2, 3, 4, 4, 6, 6, (True, True))
    whole["weight"] = whole["weight"].detach()
    grads = torch.autograd.grad(expand(**whole).sum(), [u for u in whole.values() if u.requires_grad])
    assert [g.shape for g in grads] == [(6, 4), (6, 4), (3, 2)]


BAD = {
    "write must be [M, m] with m=4, got 5": {"write": torch.zeros(6, 5)},
    "read must be [L1, N, n] with L1=2, got 3": {"read": torch.zeros(3, 6, 4)},
    "depth must be [L2, L1] with L1=2, got 3": {"depth": torch.zeros(3, 3)},
    "weight must be [L1, m, n], got 2 axes": {"weight": torch.zeros(4, 4)},
    "read must be torch.float32 like weight, got torch.float64": {"read": torch.zeros(6, 4).double()},
    "depth must be on cpu like": {"depth": torch.zeros(3, 2, device="meta")},
    "write must be [M-m, m], got 3 axes": {"write": torch.zeros(2, 6, 4), "added": True},
}


@pytest.mark.parametrize("why, bad", BAD.items(), ids=BAD)
def test_what_does_not_chain_is_refused(why, bad):
    good = {name: u.detach() for name, u in inputs(2, 3, 4, 4, 6, 6, (True, True)).items()}
    with pytest.raises(ValueError) as refusal:
        kronecker_expand(**good | bad)
    assert str(refusal.value).startswith(f"kronecker_expand: {why}")
