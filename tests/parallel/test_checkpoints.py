"""Checkpoints of `torch.distributed.checkpoint`: a run goes on as if nothing had happened."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import curvopt
from curvopt import CurvoptError
from tests.parallel import cases
from tests.parallel.ranks import alone, everywhere, part, ranks, same_everywhere
from tests.parallel.test_fully_shard import shard

NOISY = {**cases.PRIVATE, "noise_multiplier": 1.0}
OPTIMIZERS = {
    **{name: cases.OPTIMIZERS[name] for name in ("ggn_exact", "variance_adaptive", "polar")},
    "ggn_sketch": lambda params: cases.OPTIMIZERS["ggn_sketch"](
        params, generator=torch.Generator().manual_seed(5)
    ),
    "dp_sgd": partial(curvopt.DPSGD, lr=0.1, momentum=0.9, **NOISY),
    "dp_sgd_plain": partial(curvopt.DPSGD, lr=0.1, **NOISY),  # without any state of a parameter
    "dp_adam": partial(curvopt.DPAdam, lr=0.1, **NOISY),
    "quantile": lambda params: curvopt.DPSGD(
        params,
        lr=0.1,
        momentum=0.9,
        **{
            **NOISY,
            "max_grad_norm": curvopt.privacy.QuantileClipping(
                0.5, expected_batch_size=cases.N, count_noise_multiplier=3.0
            ),
        },
    ),
}
WRAPPERS = {"ddp": DistributedDataParallel, "fully_shard": shard}
BOTH = [(name, wrap) for name in OPTIMIZERS for wrap in WRAPPERS]
FIRST, MORE = 4, 5


def build(name, wrap, seed=0):
    torch.manual_seed(seed)
    model = cases.mlp()
    with torch.no_grad():
        for p in model.parameters():
            p += seed
    wrapped = WRAPPERS[wrap](model)
    return model, wrapped, OPTIMIZERS[name](model.parameters())


def go(model, wrapped, opt, begin, end, rows=part):
    torch.manual_seed(begin)  # what global draws come from belongs to the user
    for k, (x, y) in enumerate(cases.batches(end)):
        if k >= begin:
            xs, ys = rows(x.float(), y)
            cases.one_step(opt, wrapped, xs, ys, k % 2)
    return cases.weights(model)


def counters(opt):
    more = {name: getattr(opt, name) for name in opt.saved}
    if hasattr(opt, "ledger"):
        more["ledger"] = opt.ledger.state_dict()
    return copy.deepcopy(more)


def folder(tmp_path):
    (shared,) = set(everywhere(str(tmp_path)))
    return shared


def states_of(model, opt, options):
    return dict(zip(("model", "opt"), get_state_dict(model, opt, options=options), strict=True))


def save(model, opt, path, options=None):
    dcp.save(states_of(model, opt, options), checkpoint_id=path)


def load(model, opt, path, options=None):
    states = states_of(model, opt, options)
    dcp.load(states, checkpoint_id=path)
    set_state_dict(
        model, opt, model_state_dict=states["model"], optim_state_dict=states["opt"],
        options=options,
    )  # fmt: skip


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FLATTENED = [
    (name, wrap, FLAT)
    for name in ("ggn_sketch", "polar", "dp_sgd_plain", "quantile")
    for wrap in WRAPPERS
]


@pytest.mark.parametrize(("name", "wrap", "options"), [(*one, None) for one in BOTH] + FLATTENED)
@ranks()
def test_a_run_goes_on(name, wrap, options, tmp_path):
    model, wrapped, opt = build(name, wrap)
    go(model, wrapped, opt, 0, FIRST)
    save(model, opt, folder(tmp_path), options)
    counted = counters(opt)
    expected = go(model, wrapped, opt, FIRST, FIRST + MORE)
    model, wrapped, again = build(name, wrap, seed=1)
    if name == "polar":  # its state depends on the layers, which a step shows
        go(model, wrapped, again, 0, 1)
    load(model, again, folder(tmp_path), options)
    assert repr(counters(again)) == repr(counted)
    found = go(model, wrapped, again, FIRST, FIRST + MORE)
    assert all(map(torch.equal, found, expected))
    assert repr(counters(again)) == repr(counters(opt))
    if hasattr(opt, "ledger"):
        assert again.ledger.steps == FIRST + MORE


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", ["dp_sgd", "dp_adam"])
@ranks()
def test_a_private_state_put_back_in_the_middle_of_a_run_goes_on(name, wrap, tmp_path):
    """What was seen since stays accounted, on all processes, and no noise comes twice."""
    model, wrapped, opt = build(name, wrap)
    go(model, wrapped, opt, 0, FIRST)
    save(model, opt, folder(tmp_path))
    go(model, wrapped, opt, FIRST, FIRST + 2)
    first = [cases.full(p.grad).clone() for p in model.parameters()]
    load(model, opt, folder(tmp_path))
    go(model, wrapped, opt, FIRST, FIRST + 2)
    second = [cases.full(p.grad).clone() for p in model.parameters()]
    assert not any(map(torch.equal, first, second))
    assert everywhere(opt.ledger.steps) == [FIRST + 4] * 2
    same_everywhere(cases.weights(model))


@ranks()
def test_a_polar_state_needs_a_step(tmp_path):
    model, _, opt = build("polar", "ddp")
    with pytest.raises(CurvoptError, match="take a step before"):
        get_optimizer_state_dict(model, opt)


def test_places_of_a_checkpoint_are_nobodys_settings():
    for name, make in OPTIMIZERS.items():
        model = cases.mlp()
        opt = make([{"params": [p]} for p in model.parameters()])
        assert "curvopt:" not in repr(opt), name
        assert "curvopt_noise" not in repr(opt), name
        again = copy.deepcopy(opt)
        again.load_state_dict(opt.state_dict())
        assert [*map(set, again.param_groups)] == [*map(set, opt.param_groups)], name


@pytest.mark.parametrize("name", ["ggn_exact", "variance_adaptive", "dp_sgd", "dp_adam"])
def test_another_number_of_processes(name, tmp_path):
    """Saved by two, resumed by four, and by one without any shards."""
    path, noiseless = str(tmp_path), cases.OPTIMIZERS[name]

    @ranks()
    def saving():
        model = cases.mlp().double()
        wrapped = shard(model)
        opt = noiseless(model.parameters())
        for k, (x, y) in enumerate(cases.batches(FIRST)):
            cases.one_step(opt, wrapped, *part(x, y), k % 2)
        save(model, opt, path)

    def resumed():
        model, reference = cases.mlp().double(), cases.mlp().double()
        wrapped = shard(model) if dist.get_world_size() > 1 else model
        opt = noiseless(model.parameters())
        load(model, opt, path)
        one = noiseless(reference.parameters(), process_group=alone())
        for k, (x, y) in enumerate(cases.batches(FIRST + MORE)):
            if k >= FIRST:
                cases.one_step(opt, wrapped, *part(x, y), k % 2)
            cases.one_step(one, reference, x, y, k % 2)
        assert opt.steps == FIRST + MORE
        for p, expected in zip(cases.weights(model), cases.weights(reference), strict=True):
            assert float((p - expected).abs().max()) < 1e-12

    saving()
    ranks(world=4)(resumed)()
    ranks(world=1)(resumed)()


@ranks()
def test_full_states_are_broadcast_and_divided():
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for name in ("ggn_exact", "variance_adaptive", "dp_adam"):
        model, wrapped, opt = build(name, "fully_shard")
        go(model, wrapped, opt, 0, FIRST)
        saved = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        expected = go(model, wrapped, opt, FIRST, FIRST + MORE)
        model, wrapped, again = build(name, "fully_shard", seed=1)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(weights[n])
        set_optimizer_state_dict(
            model, again, saved if dist.get_rank() == 0 else {}, options=options
        )
        found = go(model, wrapped, again, FIRST, FIRST + MORE)
        assert all(map(torch.equal, found, expected)), name


# Without processes.


def test_a_fresh_state_changes_nothing():
    for name, make in cases.OPTIMIZERS.items():
        if name == "polar":
            continue
        ends = []
        for asks in (False, True):
            model = cases.mlp()
            opt = make(model.parameters())
            if asks:
                get_optimizer_state_dict(model, opt)
                assert not opt.steps
                assert opt.param_groups[0]["lr"] > 0
            ends.append(go(model, model, opt, 0, 3, rows=lambda *batch: batch))
        assert all(map(torch.equal, *ends)), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_foreign_states_are_refused_when_they_are_loaded(name):
    model = cases.mlp()
    opt = OPTIMIZERS[name](model.parameters())
    go(model, model, opt, 0, 2, rows=lambda *batch: batch)
    before, counted = repr(opt.state_dict()["state"]), repr(counters(opt))
    others = {
        "Adam": torch.optim.Adam(model.parameters()),
        "VarianceAdaptiveSGD": curvopt.VarianceAdaptiveSGD(model.parameters()),
        "DiagGGNOptimizer": curvopt.DiagGGNOptimizer(model.parameters()),
        "DPAdam": curvopt.DPAdam(model.parameters(), **NOISY),
    }
    for kind, other in others.items():
        if kind == type(opt).__name__:
            continue
        if kind == "Adam":
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            other.step()
        else:
            go(model, model, other, 0, 2, rows=lambda *batch: batch)
        with pytest.raises(CurvoptError, match="not of|no privacy ledger"):
            opt.load_state_dict(other.state_dict())
        with pytest.raises(CurvoptError, match="not of|no privacy ledger"):
            set_optimizer_state_dict(model, opt, get_optimizer_state_dict(model, other))
    wide = torch.nn.Sequential(
        torch.nn.Linear(5, 8), *cases.mlp()[1:2], torch.nn.Linear(8, 6), *cases.mlp()[3:]
    )
    other = OPTIMIZERS[name](wide.parameters())
    go(wide, wide, other, 0, 2, rows=lambda *batch: batch)
    if name != "dp_sgd_plain":  # in which nothing has a shape
        with pytest.raises(CurvoptError, match=r"shape \[8, 5\].*another model"):
            opt.load_state_dict(other.state_dict())
    assert repr(opt.state_dict()["state"]) == before
    assert repr(counters(opt)) == counted


def test_files_of_plain_torch(tmp_path):
    """`torch.save`, read with weights_only, as ever."""
    for name, make in OPTIMIZERS.items():
        model = cases.mlp()
        opt = make(model.parameters())
        go(model, model, opt, 0, 2, rows=lambda *batch: batch)
        torch.save(opt.state_dict(), Path(tmp_path) / name)
        again = make(model.parameters())
        again.load_state_dict(torch.load(Path(tmp_path) / name, weights_only=True))
        for key in ("state", "engine"):
            assert repr(again.state_dict()[key]) == repr(opt.state_dict()[key]), name
        assert repr(counters(again)) == repr(counters(opt)), name
