"""Layers whose weights are shared out over processes (FSDP2) give what one process gives."""

from datetime import timedelta

import pytest
import torch
from small_layers import LAYERS, SIZE, layer_of
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn

from lcikernels.layers import State

WORLD = 2


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


class Block(nn.Module):
    """x + layer(x), or one token of it after a state: FSDP fetches weights where forward is called."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        return x + (self.layer(x) if state is None else self.layer.step(x, state))


def compare(rank: int, store: str) -> None:
    """Outputs, gradients and a step of every layer, sharded and not; and one that is made without memory."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in LAYERS:
        torch.manual_seed(0)
        layer, sharded = (Block(layer_of(name, torch.float32)) for _ in range(2))
        sharded.load_state_dict(layer.state_dict())
        fully_shard(sharded, mesh=mesh)
        assert all(isinstance(x, DTensor) for x in sharded.parameters())
        rows = torch.randn(WORLD, 2, 9, SIZE)
        want, got = layer(rows.flatten(0, 1)), sharded(rows[rank])
        torch.testing.assert_close(got, want.view_as(rows)[rank])
        want.square().sum().div(WORLD).backward()  # FSDP takes the mean over processes
        got.square().sum().backward()
        for (what, x), y in zip(sharded.named_parameters(), layer.parameters()):
            assert x.dtype == y.dtype
            torch.testing.assert_close(whole(x.grad), y.grad, rtol=1e-4, atol=1e-4, msg=what)
        with torch.no_grad():
            state, alone = (layer.layer.allocate_state(2) for _ in range(2))
            token = rows[rank, :, 0]
            torch.testing.assert_close(sharded(token, state), layer(token, alone))

        with torch.device("meta"):
            empty = LAYERS[name]()
        fully_shard(empty, mesh=mesh)
        empty.to_empty(device="cpu")
        empty.reset_parameters()
        for (what, x), y in zip(empty.named_parameters(), LAYERS[name]().parameters()):
            x = whole(x.detach())
            assert x.shape == y.shape and x.isfinite().all(), what
            assert abs(x.mean() - y.mean()) < 2 and x.std().isclose(y.std(), rtol=0.5, atol=1e-3), what
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_sharded_layers_compute_and_train_as_whole_ones(tmp_path):
    spawn(compare, (str(tmp_path / "store"),), nprocs=WORLD)
