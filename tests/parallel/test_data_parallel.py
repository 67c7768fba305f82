"""Replicas take the steps that one process takes with the whole batch, whatever wraps the model."""

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.parallel import cases
from tests.parallel.ranks import ranks


def replicated(model):
    from torch.distributed._composable.replicate import replicate

    return replicate(model)


def ddp(**options):
    return lambda model: DistributedDataParallel(model, **options)


WRAPPERS = {
    "ddp": ddp(),
    "buckets": ddp(gradient_as_bucket_view=True, bucket_cap_mb=0.0001),
    "static_graph": ddp(static_graph=True),
    "unused": ddp(find_unused_parameters=True),
    "replicate": replicated,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@ranks()
def test_wrapped(optimizer, wrapper):
    cases.compare(optimizer, WRAPPERS[wrapper])


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@ranks()
def test_unwrapped(optimizer):
    cases.compare(optimizer, lambda model: model, group=dist.group.WORLD)


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@ranks()
def test_transformer(optimizer):
    cases.compare(optimizer, ddp(), cases.Transformer, tokens=True, steps=7)
