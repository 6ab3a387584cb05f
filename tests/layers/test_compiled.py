"""Layers as one graph for every length, with gradients, packed, step by step, exported, checkpointed."""

import shutil

import pytest
import torch
from small_layers import LAYERS, SIZE, layer_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

AUTO = torch.export.Dim.AUTO


def outputs_and_gradients(function, layer, *inputs: Tensor) -> list[Tensor]:
    y = function(*inputs)
    leaves = [x for x in (*inputs, *layer.parameters()) if x.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_serves_every_length_and_batch(name):
    torch._dynamo.reset()
    layer = layer_of(name)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for B, T in ((2, 9), (3, 17)):
        x = torch.randn(B, T, SIZE, dtype=torch.float64, requires_grad=True)
        for got, want in zip(
            outputs_and_gradients(compiled, layer, x), outputs_and_gradients(layer, layer, x)
        ):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 1
    with torch.no_grad():
        for bounds in ([0, 4, 9], [0, 2, 2, 7, 9, 17]):
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
            x = torch.randn(1, bounds[-1], SIZE, dtype=torch.float64)
            got, want = (f(x, None, cu_seqlens) for f in (compiled, layer))
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_step_changes_the_state_in_place(name):
    torch._dynamo.reset()
    layer = layer_of(name, torch.float32)
    step = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    state, other = layer.allocate_state(2), layer.allocate_state(2)
    with torch.no_grad():
        for x in torch.randn(3, 2, SIZE):
            torch.testing.assert_close(step(x, state), layer.step(x, other))
    for got, want in zip(state, other):
        assert got is None or (got.any() and torch.allclose(got, want))


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch's own
def test_inductor_gives_what_eager_gives():
    """Retention has the most of what inductor compiles itself."""
    torch._dynamo.reset()
    layer = layer_of("retention", torch.float32)
    x = torch.randn(2, 9, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_takes_other_lengths(name):
    layer = layer_of(name)
    x, longer = (torch.randn(B, T, SIZE, dtype=torch.float64) for B, T in ((2, 9), (3, 21)))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: AUTO, 1: AUTO},))
    torch.testing.assert_close(exported.module()(longer), layer(longer))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_changes_no_gradient(name, reentrant):
    layer = layer_of(name)
    x = torch.randn(2, 9, SIZE, dtype=torch.float64, requires_grad=True)
    gradients = []
    for y in (layer(x), checkpoint(layer, x, use_reentrant=reentrant)):
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
