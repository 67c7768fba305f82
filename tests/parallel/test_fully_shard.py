"""Parameters that `fully_shard` divides: the steps of one process with the whole batch."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.parallel import cases
from tests.parallel.ranks import ranks

SHARDED = [name for name in cases.OPTIMIZERS if name != "polar"]


def shard(model, **options):
    """Each layer by itself, and what is left by the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    for layer in layers or [m for m in model if isinstance(m, nn.Linear)]:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept"])
@pytest.mark.parametrize("name", SHARDED)
@ranks()
def test_mlp(name, reshard):
    opt, model = cases.compare(name, partial(shard, reshard_after_forward=reshard))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for p in model.parameters():
        for key, value in opt.state[p].items():
            assert not isinstance(value, torch.Tensor) or isinstance(value, DTensor), key


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept"])
@pytest.mark.parametrize("name", SHARDED)
@ranks()
def test_transformer(name, reshard):
    wrap = partial(shard, reshard_after_forward=reshard)
    cases.compare(name, wrap, cases.Transformer, tokens=True, steps=7)
