"""Parameters that `fully_shard` divides: the steps of one process with the whole batch."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import curvopt
from curvopt.optim.polar_factor import by_factors
from curvopt.optim.state import sides
from tests.optim.test_polar_factor import oracle as polar_factor
from tests.oracles import assert_close
from tests.parallel import cases, test_failures
from tests.parallel.cases import N
from tests.parallel.ranks import alone, part, ranks, same_everywhere

SHARDED = [*cases.OPTIMIZERS]
WHOLE = {"signal"}  # a small projection, which all processes have


class Wide(nn.Sequential):
    """Layers that are wider than the batch: stepped by their rows; and convolutions."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Unflatten(1, (4, 3, 4)),
            nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(10, 3),
        )  # fmt: skip


def shard(model, **options):
    """Each layer by itself, and what is left by the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    for layer in layers or [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]:
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
            divided = isinstance(value, DTensor) or key in WHOLE
            assert divided or not isinstance(value, torch.Tensor), key


@pytest.mark.parametrize("name", SHARDED)
@ranks()
def test_transformer(name):
    cases.compare(name, shard, cases.Transformer, tokens=True, steps=7)


@pytest.mark.parametrize("name", [name for name in SHARDED if name != "ggn_sketch"])
@ranks(world=4)
def test_some_processes_have_no_part_of_a_small_tensor(name):
    """And two replicas of two shards each: three rows on four processes."""
    cases.compare(name, shard, steps=5)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    cases.compare(name, lambda model: fully_shard(model, mesh=mesh), steps=5)


@ranks()
def test_moving_together_changes_nothing():
    cases.OPTIMIZERS["foreach"] = partial(
        curvopt.VarianceAdaptiveSGD, lr=0.05, variance_every=3, foreach=True
    )
    cases.compare("foreach", shard)


@pytest.mark.parametrize("name", ["ggn_exact", "variance_adaptive", "dp_sgd"])
@ranks()
def test_frozen_parameters(name):
    def build():
        model = cases.mlp()
        model[0].weight.requires_grad_(False)
        return model

    cases.compare(name, shard, build)


@pytest.mark.parametrize("name", ["ggn_exact", "variance_adaptive"])
@ranks()
def test_accumulation_and_clipping(name):
    make = cases.OPTIMIZERS[name]
    reference, model = cases.mlp().double(), shard(cases.mlp().double())
    one, many = make(reference.parameters(), process_group=alone()), make(model.parameters())
    # The micro-batches of one process are those of both: the same samples, the same divisors.
    order = torch.cat([torch.arange(N).view(2, 2, -1)[:, k].flatten() for k in range(2)])
    for step, (x, y) in enumerate(cases.batches(8)):
        batches = (x[order], y[order]), part(x, y)
        for opt, net, (a, b) in zip((one, many), (reference, model), batches, strict=True):
            opt.zero_grad()
            for k, (xs, ys) in enumerate(zip(a.chunk(2), b.chunk(2), strict=True)):
                if net is model and step % 2:  # torch's own way to accumulate
                    net.set_requires_gradient_sync(k == 1)
                with opt.record():
                    (F.cross_entropy(net(xs), ys) / 2).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            opt.step()
    for p, expected in zip(cases.weights(model), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


@ranks()
def test_private_accumulation():
    make = cases.OPTIMIZERS["dp_sgd"]
    reference, model = cases.mlp().double(), shard(cases.mlp().double())
    one, many = make(reference.parameters(), process_group=alone()), make(model.parameters())
    for x, y in cases.batches(4):
        for opt, net, (a, b) in ((one, reference, (x, y)), (many, model, part(x, y))):
            opt.zero_grad()
            with opt.record():
                for xs, ys in zip(a.chunk(2), b.chunk(2), strict=True):
                    F.cross_entropy(net(xs), ys).backward()
            opt.step()
    for p, expected in zip(cases.weights(model), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


@pytest.mark.parametrize("name", SHARDED)
@ranks()
def test_mixed_precision(name):
    """As one process under the same policy; parameters and state stay in float32."""
    if name == "ggn_sketch":
        cases.share_signs()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    make, mesh = cases.OPTIMIZERS[name], DeviceMesh.from_group(alone(), "cpu")
    reference = fully_shard(cases.mlp(), mesh=mesh, mp_policy=policy)
    model = shard(cases.mlp(), mp_policy=policy)
    one = make(reference.parameters(), process_group=alone())
    many = make(model.parameters())
    for k, (x, y) in enumerate(cases.batches(4)):
        cases.one_step(one, reference, x.float(), y, k % 2)
        xs, ys = part(x.float(), y)
        cases.one_step(many, model, xs, ys, k % 2)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.dtype == many.state[p].get("momentum_buffer", p).dtype == torch.float32
            for key, value in many.state[p].items():
                if not isinstance(value, torch.Tensor) or k:
                    continue
                expected = cases.full(one.state[q][key])
                if name == "polar" and key == "momentum_buffer":  # which magnifies what rounding is
                    g = cases.full(p.grad)
                    expected = 0.1 * polar_factor(g.view(len(g), -1)).view(g.shape)
                assert_close(cases.full(value), expected, 0.03)  # of the same parameters still
    same_everywhere(cases.weights(model))


def noises(**options):
    """What a step without samples leaves as the gradient, whole: noise alone."""
    torch.manual_seed(0)
    model = shard(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10)))
    opt = curvopt.DPSGD(
        model.parameters(), 0.1, **{**cases.PRIVATE, "noise_multiplier": 2.0}, **options
    )
    found = []
    for _ in range(2):
        x, y = torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64)
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        found.append(torch.cat([cases.full(p.grad).flatten() for p in model.parameters()]))
    return found, opt


@ranks()
def test_each_process_draws_the_noise_of_its_part_once():
    std = 2.0 * 0.5 / N
    for options in ({}, {"generator": torch.Generator().manual_seed(3)}):  # the same on both
        (first, second), _ = noises(**options)
        same_everywhere([first, second])
        for noise in (first, second):
            error = 5 / (2 * len(noise)) ** 0.5
            assert abs(float(noise.std()) / std - 1) < error
        # Two parts, two steps: nothing in common.
        upper, lower = first[:5000], first[5000:10000]
        for a, b in ((upper, lower), (first, second)):
            assert abs(float((a * b).mean()) / std**2) < 5 / len(a) ** 0.5


@ranks()
def test_a_saved_key_repeats_the_noise_that_would_have_come_next():
    (_, _), opt = noises()
    saved = copy.deepcopy(opt.state_dict())
    x, y = torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64)
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model = shard(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10)))
        again = curvopt.DPSGD(model.parameters(), 0.1, **{**cases.PRIVATE, "noise_multiplier": 2.0})
        again.load_state_dict(copy.deepcopy(saved))
        assert again.ledger.steps == 2
        again.step(lambda: F.cross_entropy(model(x), y))  # noqa: B023
        ends.append(cases.full(next(model.parameters()).grad))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (name, loss)
        for name in ("ggn_exact", "variance_adaptive", "polar", "dp_sgd")
        for loss in ("infinite", "coupled")
        # A private step leaves out what is not finite; matrices can do without rows.
        if (name, loss) not in (("dp_sgd", "infinite"), ("polar", "coupled"))
    ],
)
@ranks()
def test_a_step_that_fails_on_one_process_fails_on_all(name, loss):
    take = getattr(test_failures, loss)
    test_failures.fails(name, shard, None, test_failures.by_closure, take)
    test_failures.fails(name, shard, None, test_failures.by_record, take)


@pytest.mark.parametrize("dim", [0, 1])
@ranks()
def test_polar_factors_are_those_of_whole_matrices(dim):
    """By rows and by Gram matrices, of rows and of columns that are divided; logged as of one."""

    def columns(p):
        return Shard(dim if p.ndim > 1 and p.shape[1] % 2 == 0 else 0)

    make, found = partial(curvopt.PolarOptimizer, lr=0.01, weight_decay=0.1), []
    cases.OPTIMIZERS["decayed"] = lambda *a, **k: found.append(make(*a, **k)) or found[-1]
    opt, model = cases.compare("decayed", partial(shard, shard_placement_fn=columns), Wide)
    one, _ = found
    assert opt.state[model[2].weight]["rows"] == N
    by_rows = [by_factors(s["rows"], *sides(p)) for p, s in opt.state.items() if "rows" in s]
    assert {*by_rows} == {True, False}
    assert all(s["momentum_buffer"].placements == p.placements for p, s in opt.state.items())
    expected, told = one.stats(), opt.stats()
    assert told.keys() == expected.keys()
    for key in told:
        assert_close(torch.tensor(told[key]), torch.tensor(expected[key]), 1e-9)


@pytest.mark.parametrize("name", ["ggn_exact", "variance_adaptive", "polar", "dp_sgd"])
@ranks()
def test_parameters_that_are_put_in_the_place_of_others(name):
    """By who shards the model after the optimizer was built, as accelerate does."""
    make = cases.OPTIMIZERS[name]
    reference, model = cases.mlp().double(), cases.mlp().double()
    if name == "polar":
        cases.share_signs()
    one, many = make(reference.parameters(), process_group=alone()), make(model.parameters())
    wrapped = shard(model)
    many.param_groups[0]["params"] = [*model.parameters()]
    for x, y in cases.batches(5):
        cases.one_step(one, reference, x, y, 2)
        cases.one_step(many, wrapped, *part(x, y), 2)
    for p, expected in zip(cases.weights(model), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


@pytest.mark.parametrize("name", ["ggn_exact", "variance_adaptive", "polar"])
@ranks()
def test_evaluation_leaves_whole_parameters_behind(name):
    """Where the forward pass does not reshard: before the first step, and between steps."""
    make = cases.OPTIMIZERS[name]
    reference, model = cases.mlp().double(), cases.mlp().double()
    if name == "polar":
        cases.share_signs()
    wrapped = shard(model, reshard_after_forward=False)
    one, many = make(reference.parameters(), process_group=alone()), make(model.parameters())
    for x, y in cases.batches(6):
        for opt, net, (a, b) in ((one, reference, (x, y)), (many, wrapped, part(x, y))):
            with torch.no_grad():
                net(a)
            F.cross_entropy(net(a), b).backward()
            opt.step()
            opt.zero_grad()
            net(a)  # no backward pass follows
    wrapped.reshard()
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.reshard()
    for p, expected in zip(cases.weights(model), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


@ranks()
def test_a_polar_optimizer_that_goes_on_meets_all_layers(monkeypatch):
    """Its first steps record the matrices that are stepped by their rows alone."""
    monkeypatch.setattr("curvopt.optim.polar.LOOK", 7)
    make, ends, saved = cases.OPTIMIZERS["polar"], [], []
    for again in (False, True):
        model = Wide()
        wrapped = shard(model)
        opt = make(model.parameters())
        if again:
            opt.load_state_dict(saved[0])
            with torch.no_grad():
                for p, q in zip(model.parameters(), saved[1], strict=True):
                    p.copy_(q)
        for k, (x, y) in enumerate(cases.batches(9)):
            if k == 3 and not again:
                saved += copy.deepcopy([opt.state_dict(), [p.data for p in model.parameters()]])
            if k >= 3 or not again:
                cases.one_step(opt, wrapped, *part(x.float(), y), k % 2)
        ends.append(cases.weights(model))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("name", [name for name in SHARDED if name != "ggn_sketch"])
@ranks()
def test_parameters_that_are_frozen_and_thawed(name):
    """Also those that no step has met before."""

    def build():
        model = cases.mlp()
        model[0].weight.requires_grad_(False)
        return model

    make = cases.OPTIMIZERS[name]
    reference, model = build().double(), build().double()
    one, wrapped = make(reference.parameters(), process_group=alone()), shard(model)
    many = make(model.parameters())
    for k, (x, y) in enumerate(cases.batches(9)):
        for net in (reference, model):
            net[0].weight.requires_grad_(k in (3, 4, 7, 8))
            net[2].bias.requires_grad_(k not in (4, 5))
        cases.one_step(one, reference, x, y, k % 3)
        cases.one_step(many, wrapped, *part(x, y), k % 3)
    for p, expected in zip(cases.weights(model), reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)


@ranks()
def test_tensor_parallel_layers_inside_are_refused_by_name():
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model = parallelize_module(layers, mesh["model"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    opt = curvopt.DiagGGNOptimizer(model.parameters())
    x, y = next(cases.batches(1))
    said = test_failures.raised(lambda: cases.one_step(opt, model, x.float(), y, True))
    assert "tensor parallel" in said


@ranks()
def test_parameters_that_nothing_combines_are_noticed():
    """One layer is left out of what is sharded."""
    model = cases.mlp()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    opt = curvopt.DiagGGNOptimizer(model.parameters())
    x, y = part(*next(cases.batches(1)))
    said = test_failures.raised(lambda: cases.one_step(opt, model, x.float(), y, True))
    assert "nothing has combined their gradients" in said


@ranks()
def test_checkpointed_layers():
    class Checkpointed(cases.Transformer):
        def forward(self, x):
            h = self.embedding(x)
            for layer in self.layers:
                h = checkpoint(layer, h, use_reentrant=False)
            return self.head(h.mean(1))

    for name in ("ggn_exact", "variance_adaptive", "dp_sgd"):
        cases.compare(name, shard, Checkpointed, tokens=True, steps=4)
