"""A step that fails, wherever it does, has changed nothing: parameters, state, ledger."""

import copy
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvopt
from curvopt.privacy import QuantileClipping

private = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 8}


def quantile(noise):
    return QuantileClipping(1.0, expected_batch_size=8, count_noise_multiplier=noise)


dp_sgd = partial(curvopt.DPSGD, lr=0.1, weight_decay=0.01, **private)
ROWS = {
    "diag_ggn": partial(curvopt.DiagGGNOptimizer, weight_decay=0.1, curvature_every=3),
    "variance_adaptive": partial(
        curvopt.VarianceAdaptiveSGD, variance_every=3, weight_decay=0.1, noise_tests=True
    ),
    "variance_adaptive-foreach": partial(
        curvopt.VarianceAdaptiveSGD, variance_every=3, foreach=True, debiased=True
    ),
    "polar": partial(curvopt.PolarOptimizer, weight_decay=0.1),
    "dp_sgd": dp_sgd,
    "dp_sgd-momentum": partial(dp_sgd, momentum=0.9),
    "dp_sgd-nesterov": partial(dp_sgd, momentum=0.9, nesterov=True, maximize=True),
    "dp_sgd-quantile": partial(dp_sgd, momentum=0.9, max_grad_norm=quantile(1e-20)),
    "dp_adam": partial(curvopt.DPAdam, weight_decay=0.1, **private),
}
STATE = {  # a tensor of each parameter's state
    "diag_ggn": "curvature",
    "variance_adaptive": "variance",
    "variance_adaptive-foreach": "momentum_buffer",
    "polar": "momentum_buffer",
    "dp_sgd-momentum": "momentum_buffer",
    "dp_sgd-nesterov": "momentum_buffer",
    "dp_sgd-quantile": "momentum_buffer",
    "dp_adam": "exp_avg_sq",
}
every = pytest.mark.parametrize("row", ROWS)


class NoRoom(Exception):
    """There is no more memory."""


class NoMemory(TorchDispatchMode):
    """Lets all but one of the operations pass that need memory of their own."""

    def __init__(self, at):
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        fresh = not schema.is_mutable and all(r.alias_info is None for r in schema.returns)
        if fresh and func.namespace != "profiler":  # which only notes the end of a step
            self.seen += 1
            if self.seen == self.at:
                raise NoRoom
        return func(*args, **(kwargs or {}))


def no_room(*args, **kwargs):
    raise NoRoom


class Run:
    """A network in two groups, and steps."""

    def __init__(self, row, dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        options = copy.deepcopy(ROWS[row].keywords) | options  # quantile clipping has a state
        layers = (self.model[0], self.model[2])
        self.opt = ROWS[row].func([{"params": layer.parameters()} for layer in layers], **options)

    def step(self, t):
        torch.manual_seed(t)
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        x = x.to(next(self.model.parameters()).dtype)
        return self.opt.step(lambda: F.cross_entropy(self.model(x), y))

    def state(self):
        """All that must stay, copied; the generator of noise may go on."""
        state = copy.deepcopy(self.opt.state_dict())
        for key in ("noise", "line"):  # a run's name is its own
            state.get("privacy", {}).pop(key, None)
        for key in ("curvopt", "curvopt_noise"):  # copies for torch.distributed.checkpoint
            state["param_groups"][0].pop(key, None)
        others = getattr(self.opt, "norms", None), getattr(self.opt, "_sizes", None)
        return [copy.deepcopy([*self.model.parameters()]), state, copy.deepcopy(others)]


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taken", [0, 2, 3], ids=["first", "later", "measuring"])
@every
def test_wherever_memory_runs_out(row, taken, dtype, monkeypatch):
    """Whatever needs memory comes before the first change; the next step is as if nothing was."""
    run, control = Run(row, dtype), Run(row, dtype)
    for t in range(taken):
        run.step(t), control.step(t)
    update, memory = run.opt._update, NoMemory(0)

    def updating():
        with memory:
            update()

    monkeypatch.setattr(run.opt, "_update", updating)
    before, failed = run.state(), 0
    while not failed or memory.seen >= memory.at:
        memory.at, memory.seen = memory.at + 1, 0
        with suppress(NoRoom):
            run.step(taken)
            break
        assert_same(run.state(), before)
        failed += 1
    assert failed > 1
    memory.at = 0  # there is enough again
    for t in range(taken + 1, taken + 4):
        control.step(t - 1), run.step(t)
    control.step(taken + 3)
    assert_same(run.state(), control.state())


@every
def test_a_setting_of_the_second_group_that_is_no_number(row):
    run, control = Run(row), Run(row)
    run.step(0), control.step(0)
    lr, run.opt.param_groups[1]["lr"] = run.opt.param_groups[1]["lr"], "fast"
    before = run.state()
    with pytest.raises((TypeError, ValueError)):
        run.step(1)
    assert_same(run.state(), before)
    run.opt.param_groups[1]["lr"] = lr
    run.step(1), control.step(1)
    assert_same(run.state(), control.state())


@pytest.mark.parametrize("row", STATE)
def test_state_of_another_shape_in_the_second_group(row):
    run, control = Run(row), Run(row)
    run.step(0), control.step(0)
    state = run.opt.state[run.model[2].bias]
    right, state[STATE[row]] = state[STATE[row]], torch.ones(1)
    before = run.state()
    with pytest.raises(curvopt.CurvoptError, match=rf"'{STATE[row]}' in the state of .* \[3\] is"):
        run.step(1)
    assert_same(run.state(), before)
    state[STATE[row]] = right
    run.step(1), control.step(1)
    assert_same(run.state(), control.state())


@pytest.mark.parametrize("row", ["dp_sgd-momentum", "dp_sgd-quantile", "dp_adam"])
def test_noise_that_nobody_saw_costs_nothing(row, monkeypatch):
    """The sums that it went into are dropped, and the next step draws other noise."""
    norm = quantile(1.0) if row == "dp_sgd-quantile" else 1.0
    generator = torch.Generator().manual_seed(0)
    run = Run(row, noise_multiplier=0.5, max_grad_norm=norm, generator=generator)
    run.step(0)
    before, noise = run.state(), run.opt.state_dict()["privacy"]["noise"]
    with monkeypatch.context() as patch:
        patch.setattr(run.opt, "_move", no_room)
        with pytest.raises(NoRoom):
            run.step(1)
    assert_same(run.state(), before)
    assert run.opt.ledger.steps == 1
    assert all(p.grad is None for p in run.model.parameters())
    later = run.opt.state_dict()["privacy"]["noise"]
    assert any(not torch.equal(noise[key], later[key]) for key in noise)
    run.step(1)
    assert run.opt.ledger.steps == 2


def test_what_can_be_seen_is_accounted(monkeypatch):
    """A failure while the parameters move comes after the ledger's entry."""
    run = Run("dp_sgd-momentum")
    run.step(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_add_", no_room)
        with pytest.raises(NoRoom):
            run.step(1)
    assert run.opt.ledger.steps == 2
