"""What torch.library, torch.compile and FlopCounterMode ask of every op."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from devices import GPU, placed, why_not
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.flop_counter import FlopCounterMode

import lcikernels.__main__
from lcikernels.backends import TABLES, choose
from lcikernels.ops import (
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
from lcikernels.ops.library import on_its_device
from lcikernels.ops.selective_scan.op import CHECKPOINT_EVERY

OPS = torch.ops.lcikernels
TOKENS = torch.export.Dim("T", min=2, max=512)
DEVICES = sorted({"cpu", GPU})


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def rate(*shape):
    return (-torch.rand(*shape)).requires_grad_()


def packed(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def able(op):
    """The backends that can compute `op`, where they compute."""
    return [name for name in TABLES[op] if why_not(op, name) is None]


def there(arguments, device=None):
    """On that device, or where the backend computes that the last one names; leaves stay leaves."""
    for x in arguments:
        y = placed(x, arguments[-1]) if device is None else x.to(device)
        yield x if y is x else y.detach().requires_grad_(x.requires_grad)


def raw_calls():
    """Arguments of the ops underneath the public functions, all differentiable inputs among them."""
    q, k, v = leaf(2, 5, 2, 4), leaf(2, 5, 1, 4), leaf(2, 5, 2, 3)
    one = (leaf(1, 5, 2, 4), leaf(1, 5, 2, 4), leaf(1, 5, 2, 3))
    for name in able("retention"):
        yield f"retention by {name}", OPS.retention, (q, k, v, rate(2), 0.5, None, None, name)
        states = q, k, v, rate(2, 5, 2), 0.5, leaf(2, 2, 4, 3), None, name
        yield f"retention by {name}, states", OPS.retention, states
        row = *one, rate(2), 0.5, leaf(2, 2, 4, 3), packed(0, 2, 5), name
        yield f"retention by {name}, packed", OPS.retention, row

    for name in able("retention_segment"):
        yield f"retention_segment by {name}", OPS.retention_segment, (k, v, rate(2), name)
        yield f"retention_segment by {name}, rates", OPS.retention_segment, (k, v, rate(2, 5, 4), name)

    x, dt, a, b, c = leaf(2, 5, 4), leaf(2, 5, 4), rate(4, 3), leaf(2, 5, 3), leaf(2, 5, 3)
    bare = (x, dt, a, b, c, None, None, None, True, None, None, 16, "torch")
    yield "selective_scan", OPS.selective_scan, bare
    for name in able("selective_scan"):
        full = (x, dt, a, b, c, leaf(4), leaf(2, 5, 4), leaf(4), True, leaf(2, 4, 3), None)
        yield f"selective_scan by {name}", OPS.selective_scan, (*full, CHECKPOINT_EVERY[name], name)
    row = (leaf(1, 5, 4), leaf(1, 5, 4), a, leaf(1, 5, 2, 3), leaf(1, 5, 2, 3))
    row = (*row, None, None, None, True, leaf(2, 4, 3), packed(0, 2, 5), 16, "torch")
    yield "selective_scan, packed", OPS.selective_scan, row
    for name in able("selective_scan_segment"):
        yield (
            f"selective_scan_segment by {name}",
            OPS.selective_scan_segment,
            (x, dt, a, b, leaf(4), True, name),
        )
        yield (
            f"selective_scan_segment by {name}, bare",
            OPS.selective_scan_segment,
            (x, dt, a, leaf(2, 5, 2, 3), None, False, name),
        )

    weight = leaf(4, 3)
    for name in able("causal_conv1d"):
        bare = x, weight, None, None, None, None, name
        yield f"causal_conv1d by {name}, bare", OPS.causal_conv1d, bare
        full = x, weight, leaf(4), "silu", leaf(2, 4, 2), None, name
        yield f"causal_conv1d by {name}", OPS.causal_conv1d, full
        row = leaf(1, 5, 4), weight, leaf(4), "silu", leaf(2, 4, 2), packed(0, 2, 5), name
        yield f"causal_conv1d by {name}, packed", OPS.causal_conv1d, row
    for name in able("gated_rms_norm"):
        full = x, leaf(2, 5, 4), leaf(4), leaf(4), 1e-5, 1, True, "silu", "rms", name
        yield f"gated_rms_norm by {name}", OPS.gated_rms_norm, full
        first = x, leaf(2, 5, 4), leaf(4), None, 1e-5, 2, False, "sigmoid", "layer", name
        yield f"gated_rms_norm by {name}, the gate first", OPS.gated_rms_norm, first
        bare = x, None, None, None, 1e-5, 1, True, "silu", "rms", name
        yield f"gated_rms_norm by {name}, bare", OPS.gated_rms_norm, bare

    for name in able("kronecker_expand"):
        stack, maps = leaf(2, 4, 3), (leaf(6, 4), leaf(5, 3))
        yield f"kronecker_expand by {name}", OPS.kronecker_expand, (stack, *maps, leaf(3, 2), False, name)
        more = stack, *maps, None, True, name
        yield f"kronecker_expand by {name}, added units", OPS.kronecker_expand, more
        own = leaf(2, 6, 4), leaf(2, 5, 3)
        yield f"kronecker_expand by {name}, own maps", OPS.kronecker_expand, (stack, *own, None, False, name)

    token = torch.randn(2, 2, 4), torch.randn(2, 1, 4), torch.randn(2, 2, 3), -torch.rand(2)
    for name in able("retention_step"):
        state = torch.randn(2, 2, 4, 3)
        yield f"retention_step by {name}", OPS.retention_step, (*token, state, 0.5, None, name)
        some = *token, torch.randn(4, 2, 3, 4).bfloat16().mT, 0.5, torch.tensor([3, -1]), name
        yield f"retention_step by {name}, some states", OPS.retention_step, some
    for name in able("selective_scan_step"):
        token = torch.randn(2, 4), torch.randn(2, 4), -torch.rand(4, 3), torch.randn(2, 3), torch.randn(2, 3)
        token = (*token, None, None, None, True)
        all_states = torch.randn(2, 4, 3), None, name
        yield f"selective_scan_step by {name}", OPS.selective_scan_step, (*token, *all_states)
        some = torch.randn(4, 3, 4).half().mT, packed(3, -1), name
        yield f"selective_scan_step by {name}, some states", OPS.selective_scan_step, (*token, *some)
    for name in able("causal_conv1d_step"):
        token = torch.randn(2, 4), torch.randn(4, 3), None, "silu"
        bare = *token, torch.randn(2, 4, 2), None, None, name
        yield f"causal_conv1d_step by {name}", OPS.causal_conv1d_step, bare
        some = *token, torch.randn(4, 5, 4).bfloat16().mT, packed(3, -1), packed(7, 0), name
        yield f"causal_conv1d_step by {name}, some states", OPS.causal_conv1d_step, some


@pytest.mark.parametrize("op, arguments", [pytest.param(*call[1:], id=call[0]) for call in raw_calls()])
def test_opcheck(op, arguments):
    torch.library.opcheck(op, tuple(there(arguments)))


def backward_calls():
    """Arguments of the backward ops: gradients with strides of their own; every optional input missing."""
    R = torch.randn
    grad, wide = R(2, 8, 5).mT, (R(2, 5, 8), R(2, 5, 8), -torch.rand(8, 3), R(2, 5, 3), R(2, 5, 3))
    q, k, v = R(2, 5, 2, 4), R(2, 5, 1, 4), R(2, 5, 2, 3)
    states = R(2, 2, 3, 4).mT, R(2, 2, 4, 3)
    grad_o = R(2, 2, 5, 3).transpose(1, 2)
    for name in able("retention"):
        full = grad_o, states[0], q, k, v, -torch.rand(2, 5, 2), 0.5, states[1], None, True, name
        yield f"retention by {name}", OPS.retention_backward, full
        bare = grad_o, None, q, k, v, -torch.rand(2), 0.5, None, None, False, name
        yield f"retention by {name}, bare", OPS.retention_backward, bare
    for name in able("selective_scan"):
        every = CHECKPOINT_EVERY[name]
        full = R(8), R(2, 8, 5).mT, R(8), True, R(2, 8, 3), None, R(1, 2, 8, 3), every, name
        full = OPS.selective_scan_backward, (grad, R(2, 3, 8).mT, *wide, *full)
        yield f"selective_scan by {name}", *full
        bare = None, None, None, False, None, None, R(1, 2, 8, 3), every, name
        yield f"selective_scan by {name}, bare", OPS.selective_scan_backward, (grad, None, *wide, *bare)
    state, rates = R(2, 2, 3, 4).mT, -torch.rand(2)
    yield "retention_segment", OPS.retention_segment_backward, (k, v, rates, state, R(2, 2))
    yield "retention_segment, left alone", OPS.retention_segment_backward, (k, v, rates, None, R(2, 2))
    for name in able("retention_segment"):
        back = q, R(2, 2, 5, 3).transpose(1, 2), rates, 0.5, name
        yield f"retention_segment_back by {name}", OPS.retention_segment_back, back
    x, dt, a, b, c = wide
    for name in able("selective_scan_segment"):
        full = x, dt, a, b, R(8), True, R(2, 3, 8).mT, R(2, 8, 3), name
        yield f"selective_scan_segment by {name}", OPS.selective_scan_segment_backward, full
        bare = x, dt, a, b, None, False, None, R(2, 8, 3), name
        yield f"selective_scan_segment by {name}, bare", OPS.selective_scan_segment_backward, bare
        back = grad, dt, a, c, R(2, 8, 5).mT, R(8), True, name
        yield f"selective_scan_segment_back by {name}", OPS.selective_scan_segment_back, back
    for name in able("causal_conv1d"):
        everything = R(2, 5, 8), R(8, 3), R(8), "silu", R(2, 8, 2), None, name
        yield f"causal_conv1d by {name}", OPS.causal_conv1d_backward, (grad, R(2, 2, 8).mT, *everything)
        bare = grad, None, R(2, 5, 8), R(8, 3), None, None, None, None, name
        yield f"causal_conv1d by {name}, bare", OPS.causal_conv1d_backward, bare
    for name in able("gated_rms_norm"):
        everything = grad, R(2, 5, 8), R(2, 8, 5).mT, R(8), R(8), 1e-5, 2, False, "silu", "rms", name
        yield f"gated_rms_norm by {name}", OPS.gated_rms_norm_backward, everything
        bare = grad, R(2, 5, 8), None, None, None, 1e-5, 1, True, "silu", "layer", name
        yield f"gated_rms_norm by {name}, bare", OPS.gated_rms_norm_backward, bare
    for name in able("kronecker_expand"):
        maps = R(2, 4, 3), R(4, 6).T, R(5, 3)
        full = R(3, 5, 6).mT, *maps, R(3, 2), False, True, name
        yield f"kronecker_expand by {name}", OPS.kronecker_expand_backward, full
        more = R(3, 8, 10).mT, *maps, R(3, 2), True, True, name
        yield f"kronecker_expand by {name}, added units", OPS.kronecker_expand_backward, more
        bare = R(2, 6, 5), *maps, None, False, False, name
        yield f"kronecker_expand by {name}, bare", OPS.kronecker_expand_backward, bare


@pytest.mark.parametrize("op, arguments", [pytest.param(*call[1:], id=call[0]) for call in backward_calls()])
def test_opcheck_of_the_backward_ops(op, arguments):
    torch.library.opcheck(op, tuple(there(arguments)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op, arguments", [pytest.param(*call[1:], id=call[0]) for call in raw_calls()])
def test_opcheck_of_16_bit_activations(op, arguments):
    """States, rates and parameters stay as they are."""
    activations = {"q", "k", "v", "x", "dt", "b", "c", "z", "gate"}
    activations |= {"weight", "write", "read", "depth"} if op is OPS.kronecker_expand else set()
    names = [argument.name for argument in op.default._schema.arguments]
    halved = [
        x.detach().bfloat16().requires_grad_(x.requires_grad) if name in activations and x is not None else x
        for name, x in zip(names, arguments)
    ]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, tuple(there(halved)), test_utils=tests)


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("device", ["of the backend", "meta"])
@pytest.mark.parametrize("lie", ["as they are", "channels first"])
@pytest.mark.parametrize("op, arguments", [pytest.param(*call[1:], id=call[0]) for call in raw_calls()])
def test_results_that_require_gradients_can_be_written_to(op, arguments, lie, device):
    """`y += x` in training, which torch refuses where y is a view that was made inside an op."""
    arguments = list(there(arguments))
    if device == "meta":
        arguments = [
            x.to("meta").detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in arguments
        ]
    if lie == "channels first":
        arguments = [
            x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_(x.requires_grad)
            if isinstance(x, torch.Tensor) and x.dim() > 2
            else x
            for x in arguments
        ]
    results = op(*arguments)
    results = (results,) if isinstance(results, torch.Tensor) else results[:2]  # the third are the op's own
    for y in results:
        before = y.detach().clone()
        y.mul_(2)
        assert device == "meta" or torch.equal(y.detach(), 2 * before)
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    if leaves and results[0].requires_grad:
        torch.autograd.grad([y.sum() for y in results if y.requires_grad], leaves, allow_unused=True)


@pytest.mark.parametrize("op, arguments", [pytest.param(*call[1:], id=call[0]) for call in raw_calls()])
def test_autocast_changes_no_bit(op, arguments):
    """Neither forward nor backward: the ops choose their own dtypes."""
    arguments = list(there(arguments))

    def run():
        copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        for copy, x in zip(copies, arguments):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                copy.requires_grad_()
        out = op(*copies)
        out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad or x.numel()]
        leaves = [x for x in copies if isinstance(x, torch.Tensor) and x.requires_grad]
        loss = sum(x.square().sum() for x in out[:2])
        return [*out, *copies, *(torch.autograd.grad(loss, leaves) if leaves else ())]

    want = run()
    with torch.autocast(arguments[0].device.type, torch.bfloat16):
        got = run()
    for x, y in zip(got, want):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def block(x, dt, a, b, c, z, weight, log_decay, layers, write, read, depth):
    """Every op that has gradients."""
    x = causal_conv1d(x, weight, activation="silu")
    h0 = selective_scan_segment(x, dt, a, b, dt_softplus=True)
    s0 = retention_segment(x.unflatten(-1, (2, 4)), x.unflatten(-1, (2, 4)), log_decay)
    y, h = selective_scan(x, dt, a, b, c, dt_softplus=True, return_final_state=True)
    heads = y.unflatten(-1, (2, 4))
    o = retention(heads, heads, heads, log_decay).flatten(2)
    grown = kronecker_expand(layers, write, read, depth)
    o = gated_rms_norm(o, z, groups=2, norm_before_gate=False)
    return gated_rms_norm(o, z).sum() + h.sum() + grown.square().sum() + sum(u.sum() for u in h0 + s0)


def of_block(T, device):
    tokens = leaf(2, T, 8), leaf(2, T, 8), rate(8, 3), leaf(2, T, 3), leaf(2, T, 3), leaf(2, T, 8)
    stack = leaf(2, 4, 3), leaf(5, 4), leaf(6, 3), leaf(3, 2)
    return tuple(there((*tokens, leaf(8, 4), rate(2), *stack), device))


def agree(compiled, inputs):
    """Values and gradients, with those of `block`."""
    want, got = block(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, inputs)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_the_ops_compile_into_one_graph_with_gradients(device):
    torch.compiler.reset()
    agree(torch.compile(block, fullgraph=True, backend="aot_eager"), of_block(6, device))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own import
@pytest.mark.parametrize("device", DEVICES)
def test_inductor_compiles_the_ops_with_gradients(device):
    torch.compiler.reset()
    agree(torch.compile(block, fullgraph=True), of_block(6, device))


@pytest.mark.parametrize("device", DEVICES)
def test_other_lengths_are_not_compiled_anew(device):
    torch.compiler.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counted)
    compiled(*of_block(10, device))
    first = len(graphs)  # 2: dynamo traces again what has a float, eps, to make it a constant
    agree(compiled, of_block(70, device))
    assert len(graphs) == first


def test_an_op_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current GPU."""
    current = []

    @contextmanager
    def guard(x):
        current.append(x.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    there = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    assert on_its_device(lambda x: list(current))(there) == [there.device] and not current
    assert on_its_device(lambda x: list(current))(torch.ones(1)) == []


def exported():
    """A call of each public op, one that exports it with any number of tokens."""

    def R(*shape):
        return torch.randn(*shape)

    heads, rows, a = R(2, 9, 2, 4), R(2, 9, 8), -torch.rand(8, 3)
    rates = -torch.rand(2)
    yield "retention", lambda x, rates: retention(x, x, x, rates), (heads, rates), ({1: TOKENS}, None)
    scan = (rows, rows.abs(), a, R(2, 9, 3)), ({1: TOKENS}, {1: TOKENS}, None, {1: TOKENS})
    yield "selective_scan", lambda x, dt, a, b: selective_scan(x, dt, a, b, b), *scan
    yield "causal_conv1d", lambda x, weight: causal_conv1d(x, weight), (rows, R(8, 3)), ({1: TOKENS}, None)
    yield "gated_rms_norm", lambda x: gated_rms_norm(x, x), (rows,), ({1: TOKENS},)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call, arguments, shapes", [pytest.param(*x[1:], id=x[0]) for x in exported()])
def test_the_ops_export_with_any_number_of_tokens(call, arguments, shapes, device):
    arguments = tuple(there(arguments, device))

    class Model(torch.nn.Module):
        def forward(self, *arguments):
            return call(*arguments)

    program = torch.export.export(Model(), arguments, dynamic_shapes=(shapes,)).module()
    assert torch.equal(program(*arguments), call(*arguments))
    shorter = [x if shape is None else x[:, :5] for x, shape in zip(arguments, shapes)]
    assert torch.equal(program(*shorter), call(*shorter))


def test_python_m_lcikernels_names_every_backend_and_whether_it_runs(capsys):
    lcikernels.__main__.main()
    versions, compiled, devices, transformers, *lines = capsys.readouterr().out.splitlines()
    assert f", torch {torch.__version__}, " in versions and versions.startswith("lcikernels ")
    assert compiled.startswith("compiled kernels: ") and devices.startswith("devices: cpu (")
    assert transformers.startswith("transformers is not patched in this process: ")
    rows = [re.split(r" {2,}", line, maxsplit=3) for line in lines]
    want = [(op, name) for op, backends in TABLES.items() for name in backends]
    assert [(op, name) for op, device, name, _ in rows if device == "cpu"] == want
    assert all(said == "runs" for _, device, name, said in rows if (device, name) == ("cpu", "torch"))
    assert "x is on" not in str(rows)


def test_where_no_backend_can_run_every_reason_is_given():
    apple = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32)
    why = "retention: no backend can run here: 'cpp': .*; 'torch': it sums in float64"
    with pytest.raises(RuntimeError, match=why):
        choose("retention", None, apple)
    assert choose("gated_rms_norm", None, apple) == "torch"


@pytest.mark.parametrize("device", DEVICES)
def test_the_steps_compile_into_one_graph_and_update_the_state(device):
    def steps(q, log_decay, x, a, b, weight, states):
        o = retention_step(q, q, q, log_decay, state=states[0])
        y = selective_scan_step(x, x.abs(), a, b, b, state=states[1])
        return o, y, causal_conv1d_step(x, weight, state=states[2])

    torch.compiler.reset()
    inputs = (
        torch.randn(2, 2, 4),
        -torch.rand(2),
        torch.randn(2, 8),
        -torch.rand(8, 3),
        torch.randn(2, 3),
        torch.randn(8, 4),
    )
    states = torch.randn(2, 2, 4, 4), torch.randn(2, 8, 3), torch.randn(2, 8, 3)
    inputs, states = tuple(there(inputs, device)), tuple(there(states, device))
    twins = tuple(state.clone() for state in states)
    expected = steps(*inputs, twins)
    got = torch.compile(steps, fullgraph=True, backend="aot_eager")(*inputs, states)
    torch.testing.assert_close((got, states), (expected, twins))


def test_the_flop_counter_sees_forward_and_backward():
    B, T, H, K, V, D, N, W = 2, 5, 3, 4, 6, 8, 2, 4
    with FlopCounterMode(display=False) as counter:
        retention(leaf(B, T, 1, K), leaf(B, T, H, K), leaf(B, T, H, V), rate(H)).sum().backward()
    assert counter.get_total_flops() == 2 * B * T * H * K * V * (2 + 5)
    with FlopCounterMode(display=False) as counter:
        scan = selective_scan(
            leaf(B, T, D), leaf(B, T, D), rate(D, N), leaf(B, T, N), leaf(B, T, N), backend="torch"
        )
        scan.sum().backward()
    assert counter.get_total_flops() == 2 * B * T * D * N * (3 + 10)
    with FlopCounterMode(display=False) as counter:
        retention_segment(leaf(B, T, 1, K), leaf(B, T, H, V), rate(H))[0].sum().backward()
    assert counter.get_total_flops() == 2 * B * T * H * K * V * (1 + 2)
    with FlopCounterMode(display=False) as counter:
        selective_scan_segment(leaf(B, T, D), leaf(B, T, D), rate(D, N), leaf(B, T, N), backend="torch")
    assert counter.get_total_flops() == 2 * B * T * D * N * 2
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(leaf(B, T, D), leaf(D, W)).sum().backward()
    assert counter.get_total_flops() == 2 * B * T * D * W * (1 + 2)
    with FlopCounterMode(display=False) as counter:
        kronecker_expand(leaf(2, 4, 3), leaf(6, 4), leaf(5, 3), leaf(7, 2)).sum().backward()
    assert counter.get_total_flops() == 2 * (7 * 2 * 6 * 5 + 2 * 6 * 3 * (4 + 5)) * (1 + 2)


def differentiable():
    """Each public op as a function of its first argument, and that."""

    def R(*shape):
        return torch.randn(*shape)

    k, b, token, a = R(1, 5, 2, 4), R(1, 5, 3), R(1, 2, 4), rate(4, 3).detach()
    rates = rate(2).detach()
    yield "retention", lambda q: retention(q, k, k, rates), k
    yield "selective_scan", lambda x: selective_scan(x, x, a, b, b), R(1, 5, 4)
    yield "retention_segment", lambda k: retention_segment(k, k, rates)[0], k
    yield "selective_scan_segment", lambda x: selective_scan_segment(x, x, a, b)[0], R(1, 5, 4)
    yield "causal_conv1d", lambda x: causal_conv1d(x, a, activation="silu"), R(1, 5, 4)
    yield "gated_rms_norm", gated_rms_norm, R(5, 4)
    yield "kronecker_expand", lambda weight: kronecker_expand(weight, R(5, 4), R(6, 3)), R(2, 4, 3)
    yield "retention_step", lambda q: retention_step(q, token, token, rates, state=R(1, 2, 4, 4)), token
    step = R(1, 3), R(1, 3)
    yield "selective_scan_step", lambda x: selective_scan_step(x, x, a, *step, state=R(1, 4, 3)), R(1, 4)
    yield "causal_conv1d_step", lambda x: causal_conv1d_step(x, a, state=R(1, 4, 2)), R(1, 4)


EACH = pytest.mark.parametrize("name, op, x", [pytest.param(*case, id=case[0]) for case in differentiable()])


@EACH
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode
def test_derivatives_in_forward_mode_are_refused_not_zero(name, op, x):
    refused = pytest.raises((NotImplementedError, ValueError), match=rf"{name}: .*(forward.mode|tangent)")
    with refused:
        torch.func.jvp(op, (x,), (x,))
    with refused, torch.autograd.forward_ad.dual_level():
        op(torch.autograd.forward_ad.make_dual(x, x))
    with torch.autograd.forward_ad.dual_level():
        op(x)  # a constant of what is differentiated


@EACH
def test_second_derivatives_and_those_of_torch_func_are_refused_not_wrong(name, op, x):
    with pytest.raises((NotImplementedError, ValueError), match=f"{name}: "):
        torch.func.grad(lambda x: op(x).sum())(x)
    if name.endswith("_step"):
        with pytest.raises(ValueError, match=rf"{name}: \w+ must be without requires_grad"):
            op(x.clone().requires_grad_())
        return
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}_backward: it has no gradient of its own"):
        grad.sum().backward()


@EACH
def test_vmap_is_a_loop_or_refused(name, op, x):
    each = torch.stack([x, 2 * x])
    if name.endswith("_step"):
        with pytest.raises(NotImplementedError, match=f"{name}: vmap cannot map it"):
            torch.vmap(op, randomness="same")(each)
        return
    torch.manual_seed(0)
    want = op(each[0])
    torch.manual_seed(0)
    torch.testing.assert_close(torch.vmap(op, randomness="same")(each)[0], want)


@EACH
def test_inference_mode_changes_no_bit(name, op, x):
    torch.manual_seed(0)
    want = op(x)
    torch.manual_seed(0)
    with torch.inference_mode():
        assert torch.equal(op(x), want)


def test_gradients_through_vmap_are_right_or_refused():
    x, weight = leaf(3, 1, 5, 4), leaf(4, 3)
    torch.vmap(lambda x: causal_conv1d(x, weight, activation="silu"))(x).sum().backward()
    want = torch.autograd.grad(causal_conv1d(x[:, 0], weight, activation="silu").sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), want)
    a, b = rate(4, 3).detach(), torch.randn(1, 5, 3)
    with pytest.raises(NotImplementedError, match="selective_scan: vmap has no gradient of it"):
        torch.vmap(lambda x: selective_scan(x, x, a, b, b))(x)


def test_every_public_name_is_there():
    assert all(callable(getattr(lcikernels, name)) for name in lcikernels.__all__)
