import pytest
import torch
from devices import on_device, why_not
from shapes import PACKED, SELECTIVE_SCAN
from tolerance import assert_agrees

from lcikernels import selective_scan, selective_scan_step
from lcikernels.backends import TABLES
from lcikernels.ops.selective_scan.reference import selective_scan as reference


def inputs(B, T, D, N, G=None, *, S=None, dtype=torch.float32):
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    def parameter(*shape):
        return torch.randn(*shape, dtype=exact, requires_grad=True)

    bc = (B, T, N) if G is None else (B, T, G, N)
    return {
        "x": activation(B, T, D),
        "dt": activation(B, T, D),
        "a": (-3 * torch.rand(D, N, dtype=exact)).requires_grad_(),
        "b": activation(*bc),
        "c": activation(*bc),
        "d": parameter(D),
        "z": activation(B, T, D),
        "dt_bias": parameter(D),
        "dt_softplus": True,
        "initial_state": parameter(S or B, D, N),
        "return_final_state": True,
    }


@pytest.fixture(params=TABLES["selective_scan"])
def scan(request):
    """The op on each backend."""
    if why := why_not("selective_scan", request.param):
        pytest.skip(why)
    return on_device(selective_scan, request.param)


@pytest.mark.parametrize("shape", SELECTIVE_SCAN.values(), ids=SELECTIVE_SCAN)
def test_outputs_and_all_gradients_are_as_exact_as_the_reference(scan, shape, poisoned):
    assert_agrees(scan, reference, **inputs(*shape))


@pytest.mark.parametrize("missing", ["d", "z", "dt_bias", "initial_state"])
def test_what_is_optional_can_be_left_out(scan, missing, poisoned):
    assert_agrees(scan, reference, **inputs(*SELECTIVE_SCAN["a row of two chunks"]) | {missing: None})


def test_the_bare_recurrence(scan):
    bare = inputs(*SELECTIVE_SCAN["a row of two chunks"])
    bare["dt"] = bare["dt"].detach().abs().requires_grad_()
    bare = {name: bare[name] for name in ("x", "dt", "a", "b", "c")}
    assert_agrees(scan, reference, **bare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    assert_agrees(selective_scan, reference, **inputs(*SELECTIVE_SCAN["a row of two chunks"], dtype=dtype))


@pytest.mark.parametrize("bounds", PACKED.values(), ids=PACKED)
def test_packed_sequences_do_not_see_each_other(scan, bounds, poisoned):
    packed = inputs(1, bounds[-1], 18, 3, S=len(bounds) - 1)
    assert_agrees(scan, reference, **packed, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_a_decay_of_exp_minus_20_a_token_is_only_a_small_number(scan):
    strong = inputs(1, 40, 4, 3)
    strong["a"] = (strong["a"].detach() * 10 - 20).requires_grad_()
    assert_agrees(scan, reference, **strong)


@pytest.mark.parametrize("backend", [name for name in TABLES["selective_scan"] if name != "triton"])
def test_the_errors_of_a_growth_by_some_percent_a_token_do_not_add_up(backend):
    """Of e^0.04: close to 2^(1/16), so that an error of that one power would be in every step. Triton's
    kernel rounds the exponent in units of log 2 as well, the same way in every step."""
    if why := why_not("selective_scan", backend):
        pytest.skip(why)
    scan = on_device(selective_scan, backend)
    growing = inputs(1, 96, 40, 2) | {"dt_bias": None, "dt_softplus": False}
    growing["a"] = torch.full((40, 2), 0.04, requires_grad=True)
    growing["dt"] = torch.ones(1, 96, 40, requires_grad=True)
    assert_agrees(scan, reference, **growing)


def test_a_state_that_grows_and_outlasts_all_others_loses_one_rounding_in_cpp(instruction_set):
    """Not two a token, which add up to 6 ulps here."""
    if instruction_set == "base":
        pytest.skip("what rounding a product loses is known where multiplying and adding is one instruction")
    growing = inputs(2, 32, 40, 5) | {"z": None, "dt_bias": None, "dt_softplus": False}
    growing |= {"dt": torch.rand(2, 32, 40) / 2, "a": torch.rand(40, 5) / 100}
    growing["initial_state"] = torch.randn(2, 40, 5) * 2.0**20
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in growing.items()}
    (_, got), (_, truth) = selective_scan(**growing, backend="cpp"), reference(**exact)
    off = ((got - truth) / truth).abs().max().item()
    assert off <= torch.finfo(torch.float32).eps


def test_two_halves_with_the_state_carried_over_equal_the_whole(scan):
    def in_halves(initial_state, return_final_state, **whole):
        halves = [
            {name: x[:, cut] if name in {"x", "dt", "b", "c", "z"} else x for name, x in whole.items()}
            for cut in (slice(0, 21), slice(21, None))
        ]
        first, state = scan(**halves[0], initial_state=initial_state, return_final_state=True)
        second, state = scan(**halves[1], initial_state=state, return_final_state=True)
        return torch.cat([first, second], 1), state

    assert_agrees(in_halves, reference, **inputs(1, 40, 4, 3))


@pytest.mark.parametrize("backend", TABLES["selective_scan_step"])
@pytest.mark.parametrize("G", [None, 2])
def test_decoding_step_by_step_equals_the_whole_sequence(G, backend):
    if why := why_not("selective_scan_step", backend):
        pytest.skip(why)
    step = on_device(selective_scan_step, backend)
    whole = {
        name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs(2, 9, 4, 3, G).items()
    }

    def by_steps(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, return_final_state):
        state = initial_state.clone()
        options = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, state=state)
        tokens = zip(*(u.unbind(1) for u in (x, dt, b, c, z)))
        y = [step(x, dt, a, b, c, d, z=z, **options) for x, dt, b, c, z in tokens]
        return torch.stack(y, 1), state

    assert_agrees(by_steps, reference, **whole)


def test_gradcheck():
    whole = inputs(1, 19, 4, 2, 2, dtype=torch.float64)
    leaves = {name: x for name, x in whole.items() if isinstance(x, torch.Tensor)}

    def run(*values):
        return selective_scan(**dict(zip(leaves, values)), dt_softplus=True, return_final_state=True)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)
