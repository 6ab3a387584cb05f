"""Every refusal is one complete sentence: op, argument, what was expected, what came."""

import pytest
import torch

from lcikernels import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    kronecker_expand,
    retention,
    retention_segment,
    retention_step,
    selective_scan,
    selective_scan_segment,
    selective_scan_step,
)
from lcikernels.backends import TABLES, Backend


def q(*shape, **options):
    return torch.zeros(*shape or (2, 5, 4, 8), **options)


def cu(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, dtype=dtype)


DECAY = torch.zeros(4)
REFUSALS = {
    "a segment's heads that no decay fits": (
        lambda: retention_segment(q(2, 5, 3, 8), q(), DECAY),
        "retention_segment: k must be such that its heads divide 4, got 3",
    ),
    "a segment of other tokens": (
        lambda: selective_scan_segment(q(1, 5, 8), q(1, 4, 8), q(8, 2), q(1, 5, 2)),
        "selective_scan_segment: dt must be [B, T, D] with T=5, got 4 on axis 1 of shape (1, 4, 8)",
    ),
    "a wrong length": (
        lambda: retention(q(), q(), q(2, 4, 4, 8), DECAY),
        "retention: v must be [B, T, Hv, V] with T=5, got 4 on axis 1 of shape (2, 4, 4, 8)",
    ),
    "a missing axis": (
        lambda: retention(q(2, 5, 8), q(), q(), DECAY),
        "retention: q must be [B, T, Hq, K], got 3 axes: shape (2, 5, 8)",
    ),
    "no tokens": (
        lambda: retention(q(2, 0, 4, 8), q(2, 0, 4, 8), q(2, 0, 4, 8), DECAY),
        "retention: q must be [B, T, Hq, K] with T at least 1, got 0 on axis 1 of shape (2, 0, 4, 8)",
    ),
    "heads that cannot be shared": (
        lambda: retention(q(), q(2, 5, 3, 8), q(), DECAY),
        "retention: k must be such that its heads divide 4, got 3",
    ),
    "a decay for other heads": (
        lambda: retention(q(), q(), q(), torch.zeros(3)),
        "retention: log_decay must be [H] with H=4, got 3 on axis 0 of shape (3,)",
    ),
    "two dtypes": (
        lambda: retention(q(), q().bfloat16(), q(), DECAY),
        "retention: k must be torch.float32 like q, got torch.bfloat16",
    ),
    "integers": (
        lambda: retention(q().int(), q(), q(), DECAY),
        "retention: q must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    "a 16-bit decay": (
        lambda: retention(q(), q(), q(), DECAY.half()),
        "retention: log_decay must be torch.float32 for torch.float32 activations, got torch.float16",
    ),
    "another device": (
        lambda: retention(q(), q(), q(device="meta"), DECAY),
        "retention: v must be on cpu like the other arguments, got meta",
    ),
    "a state of the wrong batch": (
        lambda: retention(q(), q(), q(), DECAY, initial_state=q(3, 4, 8, 8)),
        "retention: initial_state must be [B, H, K, V] with B=2, got 3 on axis 0 of shape (3, 4, 8, 8)",
    ),
    "packing more than one row": (
        lambda: retention(q(), q(), q(), DECAY, cu_seqlens=cu(0, 5)),
        "retention: cu_seqlens must be given only with B=1 (packed sequences share one row), got B=2",
    ),
    "16-bit cu_seqlens": (
        lambda: causal_conv1d(q(1, 5, 8), q(8, 4), cu_seqlens=cu(0, 5, dtype=torch.int16)),
        "causal_conv1d: cu_seqlens must be int32 or int64 [N+1], got torch.int16 of shape (2,)",
    ),
    "64-bit cu_seqlens that 32 bits would make fit": (
        lambda: causal_conv1d(q(1, 5, 8), q(8, 4), cu_seqlens=cu(0, 2**32 + 5, dtype=torch.int64)),
        f"causal_conv1d: cu_seqlens must be 0 first, T=5 last and never falling, got [0, {2**31 - 1}]",
    ),
    "an initial state of more bits than the arithmetic": (
        lambda: retention(q(), q(), q(), DECAY, initial_state=q(2, 4, 8, 8).double()),
        "retention: initial_state must be float32, bfloat16 or float16 for torch.float32 activations,"
        " got torch.float64",
    ),
    "no sequences": (
        lambda: causal_conv1d(q(1, 5, 8), q(8, 4), cu_seqlens=cu(0)),
        "causal_conv1d: cu_seqlens must be [N+1] with N at least 1, got shape (1,)",
    ),
    "a packed state for other sequences": (
        lambda: causal_conv1d(q(1, 5, 8), q(8, 4), cu_seqlens=cu(0, 5), initial_state=q(2, 8, 3)),
        "causal_conv1d: initial_state must be [N, D, W-1] with N=1, got 2 on axis 0 of shape (2, 8, 3)",
    ),
    "an unknown activation": (
        lambda: causal_conv1d(q(1, 5, 8), q(8, 4), activation="relu"),
        "causal_conv1d: activation must be None or 'silu', got 'relu'",
    ),
    "groups that do not divide": (
        lambda: selective_scan(q(1, 5, 8), q(1, 5, 8), q(8, 2), q(1, 5, 3, 2), q(1, 5, 3, 2)),
        "selective_scan: b must be such that its groups divide 8, got 3",
    ),
    "b with groups and c without": (
        lambda: selective_scan(q(1, 5, 8), q(1, 5, 8), q(8, 2), q(1, 5, 1, 2), q(1, 5, 2)),
        "selective_scan: c must be shaped like b (1, 5, 1, 2), got (1, 5, 2)",
    ),
    "a gate of another shape": (
        lambda: gated_rms_norm(q(3, 8), q(3, 7)),
        "gated_rms_norm: gate must be [axis0, D] with D=8, got 7 on axis 1 of shape (3, 7)",
    ),
    "a bias of other channels": (
        lambda: gated_rms_norm(q(3, 8), bias=q(7)),
        "gated_rms_norm: bias must be [D] with D=8, got 7 on axis 0 of shape (7,)",
    ),
    "norms of groups that do not divide": (
        lambda: gated_rms_norm(q(3, 8), groups=3),
        "gated_rms_norm: groups must be a divisor of D=8, got 3",
    ),
    "no groups": (
        lambda: gated_rms_norm(q(3, 8), groups=0),
        "gated_rms_norm: groups must be a divisor of D=8, got 0",
    ),
    "half a group": (
        lambda: gated_rms_norm(q(3, 8), groups=0.5),
        "gated_rms_norm: groups must be a divisor of D=8, got 0.5",
    ),
    "an unknown activation of the gate": (
        lambda: gated_rms_norm(q(3, 8), q(3, 8), activation="swish"),
        "gated_rms_norm: activation must be 'silu' or 'sigmoid', got 'swish'",
    ),
    "an unknown norm": (
        lambda: gated_rms_norm(q(3, 8), kind="batch"),
        "gated_rms_norm: kind must be 'rms' or 'layer', got 'batch'",
    ),
    "an unknown place of the gate": (
        lambda: gated_rms_norm(q(3, 8), q(3, 8), norm_before_gate=None),
        "gated_rms_norm: norm_before_gate must be True or False, got None",
    ),
    "a step that should be differentiated": (
        lambda: retention_step(
            q(1, 2, 3, requires_grad=True), q(1, 2, 3), q(1, 2, 3), DECAY[:2], state=q(1, 2, 3, 3)
        ),
        "retention_step: q must be without requires_grad (decode under no_grad), got requires_grad=True",
    ),
    "a step with more indices than tokens": (
        lambda: selective_scan_step(
            q(2, 8), q(2, 8), q(8, 3), q(2, 3), q(2, 3), state=q(5, 8, 3), state_indices=cu(0, 1, 2)
        ),
        "selective_scan_step: state_indices must be [B] with B=2, got 3 on axis 0 of shape (3,)",
    ),
    "a step with an index of no state": (
        lambda: causal_conv1d_step(q(2, 8), q(8, 4), state=q(5, 8, 3), state_indices=cu(-1, 5)),
        "causal_conv1d_step: state_indices must be below S=5, each at most once, or -1, got [-1, 5]",
    ),
    "a step with one state for two tokens": (
        lambda: retention_step(
            q(2, 4, 8), q(2, 4, 8), q(2, 4, 6), None, state=q(5, 4, 8, 6), state_indices=cu(3, 3)
        ),
        "retention_step: state_indices must be below S=5, each at most once, or -1, got [3, 3]",
    ),
    "a step with too few slots": (
        lambda: causal_conv1d_step(q(2, 8), q(8, 4), state=q(2, 8, 2)),
        "causal_conv1d_step: state must be [B, D, slots] with slots at least 3, got shape (2, 8, 2)",
    ),
    "positions in no slots": (
        lambda: causal_conv1d_step(q(2, 8), q(8, 1), state=q(2, 8, 0), positions=cu(0, 0)),
        "causal_conv1d_step: state must be [B, D, slots] with slots at least 1, got shape (2, 8, 0)",
    ),
    "a step with a state of another width": (
        lambda: retention_step(q(2, 4, 8), q(2, 4, 8), q(2, 4, 6), DECAY, state=q(2, 4, 8, 8)),
        "retention_step: state must be [B, H, K, V] with V=6, got 8 on axis 3 of shape (2, 4, 8, 8)",
    ),
}


@pytest.mark.parametrize("call, sentence", REFUSALS.values(), ids=REFUSALS)
def test_refusal(call, sentence):
    with pytest.raises(ValueError) as refused:
        call()
    assert str(refused.value) == sentence


# A good call of every op, with every argument that is a tensor; those from d, bias, ... on may be None.
CALLS = {
    retention: dict(q=q(1, 5, 2, 4), k=q(1, 5, 2, 4), v=q(1, 5, 2, 3), log_decay=DECAY[:2])
    | dict(initial_state=q(1, 2, 4, 3), cu_seqlens=cu(0, 5)),
    retention_segment: dict(k=q(1, 5, 2, 4), v=q(1, 5, 2, 3), log_decay=DECAY[:2]),
    retention_step: dict(q=q(1, 2, 4), k=q(1, 2, 4), v=q(1, 2, 3), log_decay=DECAY[:2])
    | dict(state=q(1, 2, 4, 3), state_indices=cu(0)),
    selective_scan: dict(x=q(1, 5, 4), dt=q(1, 5, 4), a=q(4, 3), b=q(1, 5, 3), c=q(1, 5, 3))
    | dict(d=q(4), z=q(1, 5, 4), dt_bias=q(4), initial_state=q(1, 4, 3), cu_seqlens=cu(0, 5)),
    selective_scan_segment: dict(x=q(1, 5, 4), dt=q(1, 5, 4), a=q(4, 3), b=q(1, 5, 3), dt_bias=q(4)),
    selective_scan_step: dict(x=q(1, 4), dt=q(1, 4), a=q(4, 3), b=q(1, 3), c=q(1, 3), state=q(1, 4, 3))
    | dict(d=q(4), z=q(1, 4), dt_bias=q(4), state_indices=cu(0)),
    causal_conv1d: dict(x=q(1, 5, 4), weight=q(4, 3))
    | dict(bias=q(4), initial_state=q(1, 4, 2), cu_seqlens=cu(0, 5)),
    causal_conv1d_step: dict(x=q(1, 4), weight=q(4, 3), state=q(1, 4, 2))
    | dict(bias=q(4), state_indices=cu(0), positions=cu(0)),
    gated_rms_norm: dict(x=q(5, 4)) | dict(gate=q(5, 4), weight=q(4), bias=q(4)),
    kronecker_expand: dict(weight=q(2, 4, 3), write=q(5, 4), read=q(6, 3)) | dict(depth=q(3, 2)),
}
OPTIONAL = {"log_decay", "initial_state", "cu_seqlens", "d", "z", "dt_bias", "bias", "gate", "depth"}
OPTIONAL |= {"state_indices", "positions"}


def no_dense_tensors(x):
    """What may come in x's place, and what is said of it."""
    yield x.numpy(), "a torch.Tensor, got <class 'numpy.ndarray'>"
    yield x.tolist(), "a torch.Tensor, got <class 'list'>"
    yield x.to_sparse(), "dense (to_dense() makes it), got torch.sparse_coo"
    yield torch.nested.as_nested_tensor([x, x], layout=torch.strided), "dense (to_padded_tensor() makes it)"
    yield torch.nested.as_nested_tensor([x, x], layout=torch.jagged), "dense (to_padded_tensor() makes it)"
    for other in (x.int(), x.to(torch.complex64), x.bool()):
        if x.is_floating_point() or not other.dtype.is_signed or other.is_complex():
            yield other, str(other.dtype)
    if x.is_floating_point():
        yield torch.quantize_per_tensor(x, 1.0, 0, torch.quint8), "torch.quint8"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_whatever_is_no_dense_tensor_of_a_dtype_that_fits_is_refused_by_name(op):
    op(**CALLS[op])
    for name, x in CALLS[op].items():
        optional = name in OPTIONAL or (op, name) in (
            (gated_rms_norm, "weight"),
            (retention_segment, "log_decay"),
        )
        missing = [] if optional else [(None, "a torch.Tensor, got None")]
        for bad, said in [*no_dense_tensors(x), *missing]:
            with pytest.raises(ValueError) as refused:
                op(**CALLS[op] | {name: bad})
            assert str(refused.value).startswith(f"{op.__name__}: {name} must be "), refused.value
            assert said in str(refused.value)
        if optional:
            op(**CALLS[op] | {name: None})


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_on_meta_all_or_none(op):
    """Where all are, shapes come out; one alone is refused."""
    out = op(**{name: x.to("meta") for name, x in CALLS[op].items()})
    assert all(x.is_meta for x in (out if isinstance(out, tuple) else (out,)))
    for name, x in [*CALLS[op].items()][1:]:
        with pytest.raises(ValueError, match=f"{op.__name__}: {name} must be on cpu like"):
            op(**CALLS[op] | {name: x.to("meta")})


@pytest.mark.parametrize("bounds", [(1, 5), (0, 4), (0, 4, 2, 5)], ids=["late start", "early end", "falling"])
def test_cu_seqlens_that_do_not_cover_the_row_are_refused(bounds):
    calls = {
        "retention": lambda: retention(
            q(1, 5, 4, 8), q(1, 5, 4, 8), q(1, 5, 4, 8), DECAY, cu_seqlens=cu(*bounds)
        ),
        "causal_conv1d": lambda: causal_conv1d(q(1, 5, 8), q(8, 4), cu_seqlens=cu(*bounds)),
        "selective_scan": lambda: selective_scan(
            q(1, 5, 8), q(1, 5, 8), q(8, 2), q(1, 5, 2), q(1, 5, 2), cu_seqlens=cu(*bounds), backend="torch"
        ),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError) as refused:
            call()
        assert (
            str(refused.value)
            == f"{op}: cu_seqlens must be 0 first, T=5 last and never falling, got {list(bounds)}"
        )


def test_a_backend_that_cannot_run_says_why_and_is_never_chosen_silently(monkeypatch):
    out_of_reach = Backend("lcikernels.ops.nowhere", lambda x: f"it needs a GPU, x is on {x.device}")
    monkeypatch.setitem(TABLES, "gated_rms_norm", {"nowhere": out_of_reach, **TABLES["gated_rms_norm"]})
    with pytest.raises(RuntimeError) as refused:
        gated_rms_norm(q(3, 8), backend="nowhere")
    assert (
        str(refused.value) == "gated_rms_norm: backend 'nowhere' cannot run here: it needs a GPU, x is on cpu"
    )
    assert gated_rms_norm(q(3, 8)).shape == (3, 8)


def test_a_backend_that_does_not_exist_is_refused_with_the_list():
    with pytest.raises(RuntimeError, match="retention: there is no backend 'tritn'; there are .*'torch'"):
        retention(q(), q(), q(), DECAY, backend="tritn")
