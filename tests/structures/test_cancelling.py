"""Rows that are small beside their terms, in single precision, against double."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.structures import Lookup, Outer, Tied, total
from tests.oracles import assert_close

# Powers of two: a mean over them is exact, and so are the cotangents.
N = 8
LIMIT = 1e-3


def alternating(n, tokens, *shape, size=1e3, noise=1.0):
    """Tokens of one value and alternating sign, all but a little noise."""
    signs = torch.ones(tokens).cumsum(0).remainder(2).mul(2).sub(1)
    value = size * torch.randn(n, 1, *shape)
    return signs.view(1, -1, *[1] * len(shape)) * value + noise * torch.randn(n, tokens, *shape)


class Net(nn.Module):
    """Parameters, and a forward pass that is a function of them and of a batch."""

    def __init__(self, forward, *modules):
        super().__init__()
        self.parts, self.call = nn.ModuleList(modules), forward

    def forward(self, x):
        return self.call(x, *self.parts)


def tokens(size):
    """The gradient of a matrix on tokens that add up to almost nothing."""
    return Net(lambda x, a: a(x).sum(1), nn.Linear(64, 64)), alternating(N, 8, 64, size=size)


def tokens_formed():
    return Net(lambda x, a: a(x).sum(1), nn.Linear(5, 4)), alternating(N, 16, 5)


def twice():
    """One weight used twice, with opposite sign, on almost the same input."""
    x = 1e3 * torch.randn(N, 1, 48) + torch.randn(N, 2, 48)
    return Net(lambda x, a: a(x[:, 0]) - a(x[:, 1]), nn.Linear(48, 40)), x


def twice_otherwise():
    """Two uses that are not of one kind: a product with the matrix, and one with its transpose."""

    def forward(x, a):
        return a(x[:, 0]) - x[:, 1] @ a.weight

    x = 1e3 * torch.randn(N, 1, 1).expand(N, 1, 20) + 0.1 * torch.randn(N, 2, 20)
    return Net(forward, nn.Linear(20, 20, bias=False)), x


def convolution(channels, size):
    """Patches whose sum over the positions is almost nothing."""
    x = alternating(N, size, channels).transpose(1, 2)
    return Net(lambda x, a: a(x).sum(2), nn.Conv1d(channels, 4 * channels, 3)), x


def convolutions():
    def forward(x, a):
        return (a(x[:, 0]) - a(x[:, 1])).flatten(1)

    x = 1e3 * torch.randn(N, 1, 8, 12) + torch.randn(N, 2, 8, 12)
    return Net(forward, nn.Conv1d(8, 9, 3, bias=False)), x


def again():
    """One table row looked up again and again, with cotangents of alternating sign."""

    def forward(x, table):
        return (table(x[:, :, 0].long()) * x[:, :, 1:]).sum(1)

    index = torch.tensor([[1.0]] * 4 + [[2.0]] * 4).expand(N, 8).unsqueeze(-1)
    x = torch.cat([index, alternating(N, 8, 4, noise=1e-2)], -1)
    return Net(forward, nn.Embedding(4, 4)), x


def tied():
    """A table that is looked up, and a matrix that takes almost all of it back."""

    def forward(x, table):
        looked_up = table(x[:, :1].long()).squeeze(1) * x[:, 1:33]
        return (looked_up - x[:, 33:] @ table.weight.t()[:, 1:2]).sum(1, keepdim=True)

    value = 1e3 * torch.randn(N, 32)
    x = torch.cat([torch.ones(N, 1), value, value + torch.randn(N, 32)], 1)
    return Net(forward, nn.Embedding(40, 32)), x


def tied_head():
    """A tied head whose tokens cancel."""

    def forward(x, table):
        hidden = x[:, :, 1:] * 100
        looked_up = table(x[:, :, 0].long()).mean(1)
        return F.linear(hidden, table.weight).sum(1)[:, :3] + looked_up[:, :3]

    x = torch.cat([torch.arange(float(N)).view(N, 1, 1).expand(N, 8, 1), alternating(N, 8, 48)], -1)
    return Net(forward, nn.Embedding(40, 48)), x


def bias():
    """A bias added to tokens whose cotangents cancel."""
    x = alternating(N, 8, 4)
    return Net(lambda x, a: (a(torch.ones_like(x[:, :, :2])) * x).sum(1), nn.Linear(2, 4)), x


CASES = {
    "tokens": lambda: tokens(1e3),
    "tokens-larger": lambda: tokens(1e6),
    "tokens-huge": lambda: tokens(1e15),
    "tokens-formed": tokens_formed,
    "twice": twice,
    "twice-otherwise": twice_otherwise,
    "conv-gram": lambda: convolution(32, 12),
    "conv-formed": lambda: convolution(8, 40),
    "conv-few-positions": lambda: convolution(24, 30),
    "conv-twice": convolutions,
    "lookup": again,
    "tied": tied,
    "tied-head": tied_head,
    "bias": bias,
}


def build(name):
    torch.manual_seed(0)
    net, x = CASES[name]()
    return net, x


def linear_loss(net, x):
    return net(x).mean(1).mean()


def rows_of(net, x):
    """Per-sample gradients in double precision, ``[N, P]``."""
    net = net.double()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(linear_loss(net, s), net.parameters())])
        for s in x.double().split(1)
    ]
    net.float()
    return torch.stack(rows)


def test_a_lookup_that_takes_back_what_a_matrix_gives():
    """The cross term of a tied table, which is as large as the squares and negative."""
    torch.manual_seed(0)
    value = 1e3 * torch.randn(1, N, 1, 4)
    lookup = Lookup(-value, torch.full((N, 1), 2), torch.Size([50, 4]))
    left = torch.zeros(1, N, 1, 1, 50).index_fill(-1, torch.tensor(2), 1.0)
    matrix = Outer(left, value[0].unsqueeze(1) + 1e-2, torch.Size([50, 4]))
    structure = total([lookup, matrix])
    assert isinstance(structure, Tied)
    truth = structure.wide(range(N)).flatten(2).norm(dim=2)
    assert_close(structure.squared_norms().sqrt().double(), truth, 1e-6)
    assert structure.gauge()[1].all()


@pytest.mark.parametrize("name", CASES)
def test_norms(name):
    net, x = build(name)
    norms = curvopt.compute(
        lambda: linear_loss(net, x), net.parameters(), curvopt.BatchL2Grad()
    ).batch_l2
    total = torch.stack(list(norms.values())).double().sum(0).sqrt()
    truth = rows_of(net, x).norm(dim=1)
    assert ((total / truth - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("name", CASES)
def test_no_sample_contributes_more_than_the_clipping_norm(name):
    net, x = build(name)
    rows = rows_of(net, x)
    alone = [x[n : n + 1] for n in range(len(x))]
    for part, row in [*zip(alone, rows, strict=True), (x, None)]:
        quantity = curvopt.ClippedGradSum(LIMIT)
        result = curvopt.compute(lambda p=part: linear_loss(net, p), net.parameters(), quantity)
        flat = torch.cat([s.flatten() for s in result.clipped_grad_sum.values()]).double()
        if row is None:
            break
        assert row.norm() > LIMIT  # it is clipped
        assert flat.norm() <= LIMIT * (1 + 1e-5)
        assert_close(flat, LIMIT * row / row.norm(), 1e-5)
    assert_close(flat, (LIMIT * rows / rows.norm(dim=1, keepdim=True)).sum(0), 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_private_step_leaves_no_sample_out(name):
    net, x = build(name)
    opt = curvopt.DPSGD(
        net.parameters(), lr=1.0, noise_multiplier=0.0, max_grad_norm=LIMIT, expected_batch_size=1
    )
    one = x[:1].clone()
    opt.step(lambda: linear_loss(net, one))
    assert opt.nonfinite_samples == 0
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).double().norm()
    assert LIMIT * 0.99 < norm <= LIMIT * (1 + 1e-5)
