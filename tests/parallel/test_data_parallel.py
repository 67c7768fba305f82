"""Replicas take the steps that one process takes with the whole batch, whatever wraps the model."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import curvopt
from tests.oracles import assert_close
from tests.parallel import cases
from tests.parallel.cases import N
from tests.parallel.ranks import alone, everywhere, part, ranks, same_everywhere


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


BOTH = [(name, "ddp") for name in cases.OPTIMIZERS]
BOTH += [
    (name, wrapper)
    for name in ("ggn_exact", "variance_adaptive", "dp_sgd")
    for wrapper in WRAPPERS
    if wrapper != "ddp"
]


@pytest.mark.parametrize(("optimizer", "wrapper"), BOTH)
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


class WithLoss(nn.Module):
    """As the models of transformers: it returns its loss, and what else there is."""

    def __init__(self):
        super().__init__()
        self.model = cases.mlp()
        self.unused = nn.Linear(2, 2)

    def forward(self, x, y):
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        return {"labels": y, "count": len(x), "logits": logits, "loss": loss, "more": None}


@pytest.mark.parametrize("wrapper", ["ddp", "static_graph", "unused"])
@pytest.mark.parametrize("optimizer", ["ggn_exact", "variance_adaptive", "polar", "dp_sgd"])
@ranks()
def test_models_that_return_their_loss(optimizer, wrapper):
    """Which some modes of the wrapper hand on through a function of their own."""
    make = cases.OPTIMIZERS[optimizer]
    reference, model = WithLoss().double(), WithLoss().double()
    if wrapper == "ddp":
        reference.unused, model.unused = nn.Identity(), nn.Identity()
    one = make(reference.parameters(), process_group=alone())
    many, wrapped = make(model.parameters()), WRAPPERS[wrapper](model)
    for k, (x, y) in enumerate(cases.batches()):
        for opt, net, batch in ((one, reference, (x, y)), (many, wrapped, part(x, y))):
            opt.zero_grad()
            with nullcontext() if k % 3 and opt.goes_backward else opt.record():
                net(*batch)["loss"].backward()
            opt.step()
    if optimizer == "polar":
        assert one.state[reference.model[0].weight]["rows"] == N
        assert many.state[model.model[0].weight]["rows"] == N
    same_everywhere(cases.weights(model))
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


@ranks()
def test_quantities_of_a_loss_that_is_handed_on():
    """Each output by itself: what else the model returns is no part of the loss."""
    model = WithLoss().double()
    wrapped = WRAPPERS["unused"](model)
    x, y = part(*next(cases.batches(1)))
    found = curvopt.compute(
        lambda: wrapped(x, y)["loss"] / 3, model.named_parameters(), curvopt.BatchGrad()
    )
    for name, p in model.model.named_parameters():
        rows = [
            torch.autograd.grad(model(a, b)["loss"] / 3, p)[0]
            for a, b in zip(x.split(1), y.split(1), strict=True)
        ]
        assert_close(found.batch_grad[f"model.{name}"], torch.stack(rows), 1e-12)


@ranks()
def test_what_a_wrapper_hands_on_is_still_checked():
    """Samples that meet in the model do so behind the wrapper's function too."""

    class Coupled(WithLoss):
        def forward(self, x, y):
            logits = self.model(x)
            return F.cross_entropy(logits - logits.mean(0), y)

    for name in ("ggn_exact", "variance_adaptive", "dp_sgd"):
        model = Coupled()
        opt = cases.OPTIMIZERS[name](model.parameters())
        wrapped = WRAPPERS["unused"](model)
        x, y = part(*next(cases.batches(1)))
        with pytest.raises(curvopt.CurvoptError, match="not separate"):
            opt.step(lambda wrapped=wrapped, x=x, y=y: wrapped(x.float(), y))


def accumulate(opt, model, x, y, sync):
    """One step from two micro-batches; ``sync`` says when wrappers reduce."""
    opt.zero_grad()
    for k, (xs, ys) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        with opt.record(), sync(last=k == 1):
            (F.cross_entropy(model(xs), ys) / 2).backward()
    opt.step()


def summed(opt, model, x, y):
    """The same of a private optimizer: all micro-batches in one block, none rescaled."""
    opt.zero_grad()
    with opt.record():
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            F.cross_entropy(model(xs), ys).backward()
    opt.step()


@pytest.mark.parametrize("every", [False, True], ids=["no_sync", "each_synced"])
@pytest.mark.parametrize("optimizer", ["ggn_exact", "variance_adaptive"])
@ranks()
def test_accumulation(optimizer, every):
    make = cases.OPTIMIZERS[optimizer]
    reference, model = cases.mlp().double(), cases.mlp().double()
    wrapped = DistributedDataParallel(model)
    one, many = make(reference.parameters(), process_group=alone()), make(model.parameters())

    def sync(last):
        return nullcontext() if last or every else wrapped.no_sync()

    for x, y in cases.batches(6):
        # The micro-batches of one process are those of both: the same samples, the same divisors.
        order = torch.cat([torch.arange(N).view(2, 2, -1)[:, k].flatten() for k in range(2)])
        accumulate(one, reference, x[order], y[order], lambda last: nullcontext())
        accumulate(many, wrapped, *part(x, y), sync)
    same_everywhere(cases.weights(model))
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


@ranks()
def test_private_accumulation():
    make = cases.OPTIMIZERS["dp_sgd"]
    reference, model = cases.mlp().double(), cases.mlp().double()
    wrapped = DistributedDataParallel(model)
    one, many = make(reference.parameters(), process_group=alone()), make(model.parameters())
    for x, y in cases.batches(4):
        summed(one, reference, x, y)
        summed(many, wrapped, *part(x, y))
    same_everywhere(cases.weights(model))
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


NOISY = {
    "ggn_sketch": cases.OPTIMIZERS["ggn_sketch"],
    "variance_adaptive": cases.OPTIMIZERS["variance_adaptive"],
    "dp_sgd": partial(curvopt.DPSGD, lr=0.1, **{**cases.PRIVATE, "noise_multiplier": 1.0}),
    "dp_adam": partial(curvopt.DPAdam, lr=0.1, **{**cases.PRIVATE, "noise_multiplier": 1.0}),
}


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "unwrapped"])
@pytest.mark.parametrize("optimizer", NOISY)
@ranks()
def test_unequal_batches_and_noise_leave_replicas_equal(optimizer, wrap):
    model = cases.mlp()
    wrapped = DistributedDataParallel(model) if wrap else model
    opt = NOISY[optimizer](model.parameters(), process_group=None if wrap else dist.group.WORLD)
    sizes = [(4, 4), (5, 1), (1, 7), (3, 4)]
    for k, ((x, y), size) in enumerate(zip(cases.batches(4), sizes, strict=True)):
        here = dist.get_rank()
        xs, ys = x.float()[: sum(size)].split(size)[here], y[: sum(size)].split(size)[here]
        cases.one_step(opt, wrapped, xs, ys, k % 2)
    same_everywhere([*cases.weights(model), *(p.grad for p in model.parameters())])


@ranks()
def test_unequal_batches_have_the_variance_of_all_samples():
    """Of the loss that DistributedDataParallel leads down: the mean of the processes' losses."""
    model = cases.mlp().double()
    opt = curvopt.VarianceAdaptiveSGD(model.parameters())
    params = [*model.parameters()]
    x, y = next(cases.batches(1))
    xs, ys = x.split([5, 3])[dist.get_rank()], y.split([5, 3])[dist.get_rank()]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(a), b), params)])
        / (2 * count)
        for part, count in ((slice(0, 5), 5), (slice(5, 8), 3))
        for a, b in zip(x[part].split(1), y[part].split(1), strict=True)
    ]
    z = torch.stack(rows)
    cases.one_step(opt, DistributedDataParallel(model), xs, ys, True)
    assert opt.samples == 8
    assert_close(torch.tensor(opt.noise.trace), 8 * 8 / 7 * (z - z.mean(0)).square().sum(), 1e-6)


@ranks()
def test_processes_from_one_seed_draw_signs_of_their_own():
    drawn = []
    plain = curvopt.losses.cross_entropy.random_signs

    def keep(*args):
        drawn.append(plain(*args))
        return drawn[-1]

    curvopt.losses.cross_entropy.random_signs = keep
    for generator in (None, torch.Generator().manual_seed(3)):
        model = cases.mlp()
        opt = curvopt.DiagGGNOptimizer(model.parameters(), generator=generator)
        x, y = next(cases.batches(1))
        cases.one_step(opt, DistributedDataParallel(model), *part(x.float(), y), True)
    for first, second in zip(*everywhere(drawn), strict=True):
        assert not torch.equal(first, second)


class Branches(nn.Module):
    """Each process may take another way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    def forward(self, x, way):
        return self.heads[way](self.stem(x).tanh())


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "unwrapped"])
@pytest.mark.parametrize("optimizer", ["ggn_exact", "variance_adaptive", "dp_sgd"])
@ranks()
def test_parameters_that_only_one_process_used(optimizer, wrap):
    """As one process, in whose batch every sample takes the way that its process takes."""
    make = cases.OPTIMIZERS[optimizer]
    reference, model = Branches().double(), Branches().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if wrap else model
    group = None if wrap else dist.group.WORLD
    one = make(reference.parameters(), process_group=alone())
    many = make(model.parameters(), process_group=group)
    for k, (x, y) in enumerate(cases.batches(9)):
        ways = [(0, 0), (0, 1), (1, 0)][k % 3]

        def both(x=x, y=y, ways=ways):
            parts = zip(x.chunk(2), y.chunk(2), ways, strict=True)
            return F.cross_entropy(torch.cat([reference(a, way) for a, _, way in parts]), y)

        one.step(both)
        xs, ys = part(x, y)
        way = ways[dist.get_rank()]
        many.step(lambda xs=xs, ys=ys, way=way: F.cross_entropy(wrapped(xs, way), ys))
    same_everywhere(cases.weights(model))
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)
    assert torch.equal(model.heads[2].weight, Branches().double().heads[2].weight)


@ranks()
def test_frozen_parameters():
    for name in ("ggn_exact", "variance_adaptive", "dp_sgd"):

        def build():
            model = cases.mlp()
            model[0].weight.requires_grad_(False)
            return model

        cases.compare(name, ddp(), build)


@ranks()
def test_clipping_acts_on_the_combined_gradient():
    for name in ("ggn_exact", "variance_adaptive"):
        make = cases.OPTIMIZERS[name]
        reference, model = cases.mlp().double(), cases.mlp().double()
        wrapped = DistributedDataParallel(model)
        one, many = make(reference.parameters(), process_group=alone()), make(model.parameters())
        for x, y in cases.batches(6):
            for opt, called, net, batch in (
                (one, reference, reference, (x, y)),
                (many, wrapped, model, part(x, y)),
            ):
                opt.zero_grad()
                with opt.record():
                    F.cross_entropy(called(batch[0]), batch[1]).backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
                opt.step()
        for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
            assert_close(p, expected, 1e-12)


@ranks(world=4)
def test_two_teams_that_know_nothing_of_each_other():
    """Each team of two trains a model of its own; the process group is the wrapper's."""
    teams = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    team = dist.get_rank() // 2
    for name in ("ggn_exact", "variance_adaptive"):
        model = cases.mlp().double()
        wrapped = DistributedDataParallel(model, process_group=teams[team])
        opt = cases.OPTIMIZERS[name](model.parameters())
        for k, (x, y) in enumerate(cases.batches(4)):
            xs, ys = x.chunk(4)[dist.get_rank()], y.chunk(4)[dist.get_rank()]
            cases.one_step(opt, wrapped, xs, ys, k % 2)
        first, second, third, fourth = everywhere(cases.weights(model))
        assert all(map(torch.equal, first, second))
        assert all(map(torch.equal, third, fourth))
        assert not torch.equal(first[0], third[0])


@ranks()
def test_two_models_and_two_optimizers():
    """A generator's step goes through the discriminator's wrapper."""
    torch.manual_seed(0)
    nets = [nn.Linear(5, 5).double(), nn.Linear(5, 3).double()]
    first, second = map(DistributedDataParallel, nets)
    opts = [curvopt.DiagGGNOptimizer(net.parameters(), estimator="exact") for net in nets]
    for x, y in cases.batches(4):
        xs, ys = part(x, y)
        opts[1].step(lambda xs=xs, ys=ys: F.cross_entropy(second(first(xs).detach()), ys))
        opts[0].step(lambda xs=xs, ys=ys: F.cross_entropy(second(first(xs)), 2 - ys))
        second.zero_grad()
    same_everywhere([*nets[0].parameters(), *nets[1].parameters()])
