"""Terms of the parameters alone, in private steps of several processes: once, and alike on all."""

import pytest
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import curvopt
from tests.oracles import assert_close
from tests.parallel import cases
from tests.parallel.ranks import alone, everywhere, part, ranks, same_everywhere
from tests.parallel.test_fully_shard import shard


def decay(model, factor=0.1):
    return factor * sum(p.square().sum() for p in model.parameters())


class Inside(nn.Sequential):
    """Returns the term beside its output."""

    def forward(self, x):
        return super().forward(x), decay(self)


def mlp():
    return cases.mlp().double()


def private(model, **options):
    return curvopt.DPSGD(model.parameters(), lr=0.1, momentum=0.9, **cases.PRIVATE, **options)


def loss(model, term, x, y):
    output = model(x)
    output, more = output if isinstance(output, tuple) else (output, term)
    return F.cross_entropy(output, y) + more


def whole(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


WRAPPERS = {
    "unwrapped": (mlp, lambda model: model),
    "ddp": (mlp, DistributedDataParallel),
    "fully_shard": (lambda: Inside(*mlp()), whole),
}


def wrapped(wrapper):
    make, wrap = WRAPPERS[wrapper]
    model = make()
    group = {"process_group": dist.group.WORLD} if wrapper == "unwrapped" else {}
    return model, wrap(model), private(model, **group)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@ranks()
def test_the_steps_of_one_process_with_the_whole_batch(wrapper):
    reference = mlp()
    one = private(reference, process_group=alone())
    model, called, many = wrapped(wrapper)
    inside = wrapper == "fully_shard"
    for x, y in cases.batches(4):
        one.step(lambda x=x, y=y: loss(reference, decay(reference), x, y))
        many.step(lambda x=x, y=y: loss(called, 0 if inside else decay(model), *part(x, y)))
    if not inside:  # no forward pass, in which divided parameters would be whole
        one.empty_step(lambda: decay(reference))
        many.empty_step(lambda: decay(model))
    same_everywhere(cases.weights(model))
    for p, expected in zip(cases.weights(model), reference.parameters(), strict=True):
        assert_close(p, expected.detach(), 1e-12)


@pytest.mark.parametrize("wrapper", ["unwrapped", "ddp"])
@pytest.mark.parametrize("factors", [(0.1, None), (None, 0.1), (0.1, 0.2)])
@ranks()
def test_a_term_that_differs_between_processes_is_refused(wrapper, factors):
    """It would be the first process's, whatever the others have."""
    model, called, opt = wrapped(wrapper)
    ((x, y),) = cases.batches(1)
    before, factor = cases.weights(model), factors[dist.get_rank()]
    term = 0 if factor is None else decay(model, factor)
    with pytest.raises(curvopt.CurvoptError, match="terms? .*that hold no sample"):
        opt.step(lambda: loss(called, term and decay(model, factor), *part(x, y)))
    assert all(everywhere([b.equal(a) for a, b in zip(before, cases.weights(model), strict=True)]))


@ranks()
def test_divided_parameters_are_whole_inside_the_forward_pass_alone():
    model = shard(mlp())
    opt = private(model)
    ((x, y),) = cases.batches(1)
    with pytest.raises(curvopt.CurvoptError, match="fully_shard divides .*penalties there"):
        opt.step(lambda: loss(model, decay(model), *part(x, y)))
