"""A step that fails on one process fails on all, within seconds; what cannot be served says so."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import curvopt
from curvopt import CurvoptError
from tests.optim.test_polar_factor import oracle
from tests.oracles import assert_close
from tests.parallel import cases
from tests.parallel.ranks import everywhere, part, ranks, same_everywhere

ORDINARY = ["ggn_exact", "variance_adaptive"]
PRIVATE = ["dp_sgd"]


def raised(function):
    """The message of an error, which must come at once."""
    begin, said = time.monotonic(), None
    try:
        function()
    except (CurvoptError, RuntimeError) as error:
        said = str(error)
    assert time.monotonic() - begin < 10
    return said


def state_of(opt, model):
    tensors = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [cases.full(tensor).clone() for tensor in (*model.parameters(), *tensors)]


def by_closure(opt, model, x, y, loss):
    opt.step(lambda: loss(model(x), y))


def by_record(opt, model, x, y, loss):
    opt.zero_grad()
    with opt.record():
        loss(model(x), y).backward()
    opt.step()


def by_loop(opt, model, x, y, loss):
    opt.zero_grad()
    loss(model(x), y).backward()
    opt.step()


def infinite(output, y):
    return F.cross_entropy(output / (dist.get_rank() - 1), y)


def coupled(output, y):
    return F.cross_entropy(output - output.mean(0) if dist.get_rank() else output, y)


def out_of_data(output, y):
    if dist.get_rank():
        raise RuntimeError("out of data")
    return F.cross_entropy(output, y)


def fails(name, wrap, group, take, loss):
    """Two steps, one that fails on the second process, and two more."""
    model = cases.mlp()
    wrapped = wrap(model)
    opt = cases.OPTIMIZERS[name](model.parameters(), process_group=group)
    batches = [part(x.float(), y) for x, y in cases.batches(5)]
    if name not in PRIVATE:
        batches.insert(1, batches[0])  # the fourth step measures
    for x, y in batches[:3]:
        take(opt, wrapped, x, y, F.cross_entropy)
    before = state_of(opt, model)
    said = everywhere(raised(lambda: take(opt, wrapped, *batches[3], loss)))
    assert "failed on process 1" in said[0], said[0]
    assert said[1] is not None
    assert "failed on process" not in said[1]
    assert all(map(torch.equal, before, state_of(opt, model)))
    opt.zero_grad()
    for x, y in batches[3:]:
        take(opt, wrapped, x, y, F.cross_entropy)
    same_everywhere(state_of(opt, model))
    return said[1]


WRAPPED = {
    "ddp": DistributedDataParallel,
    "static_graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "unwrapped": lambda model: model,
}


@pytest.mark.parametrize("take", [by_closure, by_record, by_loop])
@pytest.mark.parametrize("loss", [infinite, coupled])
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", ORDINARY)
@ranks()
def test_what_cannot_be_measured_on_one_process(name, wrapper, loss, take):
    group = dist.group.WORLD if wrapper == "unwrapped" else None
    said = fails(name, WRAPPED[wrapper], group, take, loss)
    assert ("not finite" if loss is infinite else "not separate") in said


@pytest.mark.parametrize("wrapper", WRAPPED)
@ranks()
def test_what_polar_cannot_step_along_on_one_process(wrapper):
    group = dist.group.WORLD if wrapper == "unwrapped" else None
    said = fails("polar", WRAPPED[wrapper], group, by_closure, infinite)
    assert "not finite" in said


@pytest.mark.parametrize("take", [by_closure, by_record])
@pytest.mark.parametrize("wrapper", ["ddp", "unwrapped", "fully_shard"])
@pytest.mark.parametrize("name", ORDINARY)
@ranks()
def test_a_loss_that_is_not_finite_where_nothing_is_measured(name, wrapper, take):
    from tests.parallel.test_fully_shard import shard

    model = cases.mlp()
    wrapped = {**WRAPPED, "fully_shard": shard}[wrapper](model)
    group = dist.group.WORLD if wrapper == "unwrapped" else None
    opt = cases.OPTIMIZERS[name](model.parameters(), process_group=group)
    batches = [part(x.float(), y) for x, y in cases.batches(5)]
    count = 5 if name == "ggn_exact" else 2  # measured at 0, 1, 2, 3; at 0, 3
    for k in range(count):
        take(opt, wrapped, *batches[k % 5], F.cross_entropy)
    before = state_of(opt, model)
    assert not opt._measures()
    said = everywhere(raised(lambda: take(opt, wrapped, *batches[0], infinite)))
    assert "failed on process 1" in said[0], said
    assert "not finite" in said[1], said
    assert all(map(torch.equal, before, state_of(opt, model)))
    opt.zero_grad()
    take(opt, wrapped, *batches[0], F.cross_entropy)
    same_everywhere(state_of(opt, model))


@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
@ranks()
def test_coupled_samples_of_one_process_leave_the_gradients_factor(wrapper):
    """Matrices can do without rows; the others must not wait for them."""
    from tests.parallel.test_fully_shard import Wide, shard

    model = Wide()
    wrapped = {"ddp": DistributedDataParallel, "fully_shard": shard}[wrapper](model)
    opt = cases.OPTIMIZERS["polar"](model.parameters())
    for k, (x, y) in enumerate(cases.batches(5)):
        loss = coupled if k == 3 else F.cross_entropy
        before = {p: state["momentum_buffer"].clone() for p, state in opt.state.items()}
        by_closure(opt, wrapped, *part(x.float(), y), loss)
        p = model[2].weight
        expected = 0.9 * cases.full(before[p]) if k else 0
        expected = expected + 0.1 * oracle(cases.full(p.grad))
        assert_close(cases.full(opt.state[p]["momentum_buffer"]), expected, 1e-3)
        assert opt.state[p]["rows"] == cases.N
    same_everywhere(state_of(opt, model))


@pytest.mark.parametrize("take", [by_closure, by_record])
@pytest.mark.parametrize("wrapper", ["ddp", "unwrapped"])
@pytest.mark.parametrize("name", PRIVATE)
@ranks()
def test_what_a_private_step_refuses_on_one_process(name, wrapper, take):
    assert "not separate" in fails(name, WRAPPED[wrapper], None, take, coupled)


@pytest.mark.parametrize("name", [*ORDINARY, *PRIVATE])
@ranks()
def test_an_error_in_the_closure_of_one_process(name):
    assert "out of data" in fails(name, lambda m: m, dist.group.WORLD, by_closure, out_of_data)


@pytest.mark.parametrize("name", ORDINARY)
def test_a_process_that_ends_takes_the_others_with_it(name):
    @ranks(timeout=30)
    def run():
        model = cases.mlp()
        wrapped = DistributedDataParallel(model)
        opt = cases.OPTIMIZERS[name](model.parameters())
        x, y = part(*next(cases.batches(1)))
        by_closure(opt, wrapped, x.float(), y, F.cross_entropy)
        said = raised(lambda: by_closure(opt, wrapped, x.float(), y, out_of_data))
        assert ("out of data" if dist.get_rank() else "Connection") in said
        os._exit(0)

    with pytest.raises(AssertionError, match="(?s)rank 0: died.*rank 1: died"):
        run()


@pytest.mark.parametrize("name", ORDINARY)
@ranks()
def test_a_process_that_did_not_move_is_noticed(name):
    model = cases.mlp()
    opt = cases.OPTIMIZERS[name](model.parameters())
    wrapped = DistributedDataParallel(model)
    x, y = part(*next(cases.batches(1)))
    by_closure(opt, wrapped, x.float(), y, F.cross_entropy)
    if dist.get_rank():
        state = opt.state[model[0].weight]
        kept = state.pop("momentum_buffer")
        assert "is missing" in raised(
            lambda: by_closure(opt, wrapped, x.float(), y, F.cross_entropy)
        )
        state["momentum_buffer"] = kept
    else:
        by_closure(opt, wrapped, x.float(), y, F.cross_entropy)
    said = raised(lambda: by_closure(opt, wrapped, x.float(), y, F.cross_entropy))
    assert "differ in steps taken: [2, 1]" in said


@pytest.mark.parametrize("wrap", [True, False], ids=["ddp", "unwrapped"])
@pytest.mark.parametrize("name", ["ggn_exact", "variance_adaptive"])
@ranks()
def test_an_overflow_on_one_process_skips_the_step_on_all(name, wrap):
    model = cases.mlp()
    wrapped = DistributedDataParallel(model) if wrap else model
    group = None if wrap else dist.group.WORLD
    opt = cases.OPTIMIZERS[name](model.parameters(), process_group=group)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k, (x, y) in enumerate(cases.batches(6)):
        xs, ys = part(x.float(), y)
        loss = F.cross_entropy(wrapped(xs), ys)
        (scaler.scale(loss) * (float("inf") if k in (2, 3) and dist.get_rank() else 1)).backward()
        before = state_of(opt, model)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        same = all(map(torch.equal, before, state_of(opt, model)))
        assert everywhere(same) == [k in (2, 3)] * 2, k
    assert everywhere(opt.steps) == [4, 4]
    same_everywhere(state_of(opt, model))


# What cannot be served.


@pytest.mark.parametrize("name", ORDINARY)
@ranks()
def test_nothing_combines(name):
    model = cases.mlp()
    opt = cases.OPTIMIZERS[name](model.parameters())
    x, y = part(*next(cases.batches(1)))
    before = state_of(opt, model)
    said = raised(lambda: by_closure(opt, model, x.float(), y, F.cross_entropy))
    assert "wrap the model in DistributedDataParallel" in said
    assert "process_group=torch.distributed.group.WORLD" in said
    assert all(map(torch.equal, before, state_of(opt, model)))


@pytest.mark.parametrize("name", ORDINARY)
@ranks()
def test_no_sync_alone(name):
    model = cases.mlp()
    wrapped = DistributedDataParallel(model)
    opt = cases.OPTIMIZERS[name](model.parameters())
    x, y = part(*next(cases.batches(1)))
    with wrapped.no_sync():
        said = raised(lambda: by_closure(opt, wrapped, x.float(), y, F.cross_entropy))
    assert "no_sync" in said


@ranks()
def test_settings_that_differ():
    rank = dist.get_rank()
    x, y = part(*next(cases.batches(1)))
    options = {
        "settings": dict(curvature_every=3 + rank),
        "parameter groups": dict(lr=0.1 + rank),
    }
    for name, option in options.items():
        model = cases.mlp()
        opt = curvopt.DiagGGNOptimizer(model.parameters(), **option)
        wrapped = DistributedDataParallel(model)
        said = raised(lambda: by_closure(opt, wrapped, x.float(), y, F.cross_entropy))  # noqa: B023
        assert f"the processes differ in {name}" in said


@ranks()
def test_parameters_that_differ_at_the_start():
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(5, 3)
    opt = curvopt.DiagGGNOptimizer(model.parameters(), process_group=dist.group.WORLD)
    x, y = part(*next(cases.batches(1)))
    said = raised(lambda: by_closure(opt, model, x.float(), y, F.cross_entropy))
    assert "differ in the parameters" in said


@pytest.mark.parametrize("name", ORDINARY)
@ranks()
def test_a_divided_state_is_refused_by_name(name):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = cases.mlp()
    opt = ZeroRedundancyOptimizer(model.parameters(), cases.OPTIMIZERS[name].func, lr=0.05)
    wrapped = DistributedDataParallel(model)
    x, y = part(*next(cases.batches(1)))
    said = raised(lambda: by_closure(opt, wrapped, x.float(), y, F.cross_entropy))
    assert "ZeroRedundancyOptimizer" in said
    assert "fully_shard" in said


@ranks()
def test_uneven_inputs_are_refused_by_name():
    model = cases.mlp()
    wrapped = DistributedDataParallel(model)
    opt = curvopt.DiagGGNOptimizer(model.parameters())
    x, y = part(*next(cases.batches(1)))
    with wrapped.join():
        said = raised(lambda: by_closure(opt, wrapped, x.float(), y, F.cross_entropy))
    assert "drop_last" in said


def test_threads_are_refused_by_name():
    model = DataParallel(nn.Linear(5, 3))
    model.device_ids = [0, 1]
    opt = curvopt.DiagGGNOptimizer(model.parameters())
    with pytest.raises(CurvoptError, match="use DistributedDataParallel"):
        opt.step(lambda: model(torch.randn(4, 5)).square().mean())


@pytest.mark.parametrize("name", ["ggn_exact", "dp_sgd"])
@ranks()
def test_the_first_fully_sharded_is_refused_by_name(name):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        model = FullyShardedDataParallel(
            cases.mlp(), use_orig_params=original, device_id=torch.device("cpu")
        )
        opt = cases.OPTIMIZERS[name](model.parameters())
        x, y = part(*next(cases.batches(1)))
        said = raised(lambda: by_closure(opt, model, x.float(), y, F.cross_entropy))  # noqa: B023
        assert "FSDP1" in said
        assert "fully_shard" in said


@pytest.mark.parametrize("name", [*ORDINARY, "dp_sgd"])
@ranks()
def test_tensor_parallel_is_refused_by_name(name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model = parallelize_module(layers, init_device_mesh("cpu", (2,)), plan)
    opt = cases.OPTIMIZERS[name](model.parameters())
    x, y = next(cases.batches(1))
    said = raised(lambda: by_closure(opt, model, x.float(), y, F.cross_entropy))
    assert "tensor parallel" in said
