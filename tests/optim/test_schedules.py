"""What is measured is scheduled by tensor: by the number of gradients that it has had."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.optim.schedule import is_due

N, D, H, C = 6, 4, 5, 3
OPTIMIZERS = {
    "diag_ggn": lambda params: curvopt.DiagGGNOptimizer(params, curvature_every=5),
    "polar": lambda params: curvopt.PolarOptimizer(params, curvature_every=5),
    "variance": lambda params: curvopt.VarianceAdaptiveSGD(params, variance_every=5),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
habits = pytest.mark.parametrize("habit", ["closure", "record", "ordinary"])


class Tasks(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.table = nn.Embedding(7, D)
        self.body = nn.Linear(D, H)
        self.heads = nn.ModuleList(nn.Linear(H, C) for _ in range(heads))

    def forward(self, ids, heads):
        h = self.body(self.table(ids)).tanh()
        return sum(self.heads[k](h) for k in heads)


def train(opt, net, turns, habit):
    for k, heads in enumerate(turns):
        draw = torch.Generator().manual_seed(k)
        ids, y = torch.randint(7, (N,), generator=draw), torch.arange(N) % C
        opt.zero_grad()
        if habit == "closure":
            opt.step(lambda ids=ids, y=y, heads=heads: F.cross_entropy(net(ids, heads), y))
            continue
        if habit == "record":
            with opt.record():
                F.cross_entropy(net(ids, heads), y).backward()
        else:
            F.cross_entropy(net(ids, heads), y).backward()
        opt.step()


def measured(name, opt, p):
    """How often a tensor was measured."""
    state = opt.state[p]
    if name == "variance":
        return state["measured"]
    return round(math.log(1 - state["weight"]) / math.log(0.95)) if "weight" in state else None


def assert_scheduled(name, opt, p, gradients, lost=0):
    steps = opt.state[p]["step"]
    assert gradients - lost <= steps <= gradients
    count = measured(name, opt, p)
    if name == "variance":
        assert count >= gradients // 5
    elif count is not None:
        assert count == sum(is_due(k, 5) for k in range(steps))


@habits
@every
def test_two_tasks_in_turn(name, habit):
    torch.manual_seed(0)
    net = Tasks(2)
    opt = OPTIMIZERS[name](net.parameters())
    train(opt, net, [[k % 2] for k in range(24)], habit)
    for p in (*net.table.parameters(), *net.body.parameters()):
        assert_scheduled(name, opt, p, 24)
    for p in net.heads.parameters():
        assert_scheduled(name, opt, p, 12, lost=1)


@habits
@every
def test_blocks_left_out_at_random(name, habit):
    """A block in one of ten steps loses its first gradient at most, of which nothing is known."""
    torch.manual_seed(0)
    net = Tasks(3)
    opt = OPTIMIZERS[name](net.parameters())
    draw = torch.Generator().manual_seed(1)
    turns = [[0, *(k for k in (1, 2) if torch.rand((), generator=draw) < 0.2)] for _ in range(60)]
    train(opt, net, turns, habit)
    for k, head in enumerate(net.heads):
        gradients = sum(k in heads for heads in turns)
        assert gradients > 5
        for p in head.parameters():
            assert_scheduled(name, opt, p, gradients, lost=1)


@every
def test_a_tensor_that_comes_once_and_is_waited_for_costs_no_passes(name):
    torch.manual_seed(0)
    net = Tasks(2)
    opt = OPTIMIZERS[name](net.parameters())
    train(opt, net, [[0]] * 3 + [[0, 1]] + [[0]] * 3, "closure")
    before = {p: measured(name, opt, p) for p in net.body.parameters()}
    train(opt, net, [[0]] * 2, "closure")  # of the body's counts 7 and 8 none is due
    assert before == {p: measured(name, opt, p) for p in net.body.parameters()}


@every
def test_frozen_tensors_are_not_waited_for(name):
    torch.manual_seed(0)
    net = Tasks(2)
    opt = OPTIMIZERS[name](net.parameters())
    train(opt, net, [[0, 1]] * 3, "closure")
    net.heads[1].requires_grad_(False)
    train(opt, net, [[0]] * 4, "closure")
    if name != "polar":
        assert not opt._measures()


@habits
def test_rows_of_a_head_that_has_no_turn(habit):
    """`PolarOptimizer` records only what it measures, of which a loss may reach nothing."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(40, C), nn.Linear(40, C)])
    opt = curvopt.PolarOptimizer(net.parameters())

    def step(k):
        draw = torch.Generator().manual_seed(k)
        x, y = torch.randn(2, 40, generator=draw), torch.arange(2) % C
        opt.zero_grad()
        if habit == "closure":
            opt.step(lambda: F.cross_entropy(net[k % 2](x), y))
            return
        if habit == "record":
            with opt.record():
                F.cross_entropy(net[k % 2](x), y).backward()
        else:
            F.cross_entropy(net[k % 2](x), y).backward()
        opt.step()

    for k in range(8):
        before = net[k % 2].weight.detach().clone()
        step(k)
        if k > 1:
            assert not torch.equal(before, net[k % 2].weight)
