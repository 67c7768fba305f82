"""Elementwise ops and copies: operators, methods, in-place forms, broadcasting, sample axes."""

import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests.cases import Model, function
from tests.ops.rows import exact


def inplace(x, b, c):
    """In-place forms on an activation, and on one of its views."""
    h = x * c
    h += b
    h -= b.sin()
    h *= b
    h /= 2 + b * b
    h[:, 0].add_(b[0], alpha=2)
    h.addcmul_(x, b, value=0.5)
    return h


def first(x):
    """The axis after the samples, first."""
    return x.transpose(0, 1)


def tokens(x, token, w):
    return torch.cat([token.expand(x.shape[0], -1, -1), x @ w], 1)


def tokens_inserted(x, token, w):
    h = x.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2])
    h[:, :1] = token.expand(x.shape[0], 1, -1)
    h[:, 1:] = x @ w
    return h.tanh()


def queries(x, q, w):
    """Queries with the batch on axis 1, as in DETR."""
    h = first(x @ w)
    q = q.unsqueeze(1).repeat(1, h.shape[1], 1)
    return first(q * h.mean(0, keepdim=True))


class Masked(nn.Module):
    """A buffer of the parameter's shape makes a derived parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("mask", torch.randn(3, 4).sign())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask).tanh()


class Distances(nn.Module):
    """A buffer that the parameter is broadcast to, as large as any batch."""

    def __init__(self, size):
        super().__init__()
        self.slopes, self.weight = nn.Parameter(torch.randn(2, 1, 1)), nn.Parameter(torch.rand(3))
        self.register_buffer("distances", torch.randn(size, size))

    def forward(self, x):
        h = x * self.weight
        scores = (h @ h.mT).unsqueeze(1) + self.slopes * self.distances
        return scores.softmax(-1)


def both(x, p):
    """A parameter twice in one op, in several ops, and in two roles."""
    return torch.addcmul(p, p, x * p) + p / (1 + x * x * p * p) + p * p


ROWS = {
    "add": Model((4,), function(lambda x, b: x + b, b=4)),
    "add-reflected": Model((4,), function(lambda x, b: b + x.tanh(), b=4)),
    "add-alpha": Model((4,), function(lambda x, b: torch.add(x, b, alpha=-2), b=4)),
    "add-first": Model((4,), function(lambda x, b: torch.add(b, x, alpha=3), b=(1, 4))),
    "add-scalar": Model((2, 3), function(lambda x, b: x.add(b), b=())),
    "add-tokens": Model((3, 4), function(lambda x, b: x + b, b=(3, 1))),
    "add-table": Model((3, 4), function(lambda x, b: x + b[:3], b=(5, 4))),
    "add-time-first": Model((5, 4), function(lambda x, b: first(first(x) + b), b=(5, 1, 4))),
    "add-time-first-even": Model((2, 4), function(lambda x, b: first(first(x) + b), b=4)),
    "add-flattened": Model((5, 4), function(lambda x, b: (x.flatten(0, 1) + b).view_as(x), b=4)),
    "sub": Model((4,), function(lambda x, b: x - b, b=4)),
    "sub-reflected": Model((4,), function(lambda x, b: b - x, b=4)),
    "sub-alpha": Model((4,), function(lambda x, b: torch.sub(x, b, alpha=3), b=4)),
    "sub-number": Model((4,), function(lambda x, b: x * (2 - b), b=4)),
    "mul": Model((4,), function(lambda x, b: x * b, b=4)),
    "mul-reflected": Model((3, 4), function(lambda x, b: b * x, b=(3, 4))),
    "mul-outer": Model((1, 4), function(lambda x, b: x * b, b=(3, 1))),
    "mul-tokens": Model((3, 4), function(lambda x, b: x.tanh() * b, b=(3, 1))),
    "mul-time-first": Model((5, 4), function(lambda x, b: first(first(x) * b), b=(5, 1, 1))),
    "mul-square": Model((4, 4), function(lambda x, b: x * b, b=(4, 1))),  # as many as samples
    "mul-integers": Model((4,), function(lambda x, b: x.mul(9).long() * b, b=4)),
    "div": Model((4,), function(lambda x, b: x / (3 + b), b=4)),
    "div-reflected": Model((4,), function(lambda x, b: b / (2 + x.square()), b=4)),
    "div-both": Model((4,), function(lambda x, a, b: a / (2 + (x * b) ** 2) / b, a=4, b=4)),
    "div-number": Model((4,), function(lambda x, b: x * (1 / b), b=4)),
    "inplace": Model((4,), function(inplace, b=4, c=())),
    "addcmul": Model((4,), function(lambda x, b, w: torch.addcmul(b, x, w, value=2), b=4, w=4)),
    "lerp": Model((4,), function(lambda x, b: x.lerp(x.tanh(), b), b=4)),
    "lerp-number": Model((4,), function(lambda x, b: torch.lerp(x.tanh(), b, 0.3), b=4)),
    "where": Model((4,), function(lambda x, b: torch.where(x > 0, b, x.sin()), b=4)),
    "where-other": Model((4,), function(lambda x, b: torch.where(x > 0, 0.0, b), b=4)),
    "where-method": Model((3, 4), function(lambda x, b: (2 * x).where(x > 0, b), b=(3, 1))),
    "prelu": Model((4,), lambda: nn.PReLU(4)),
    "prelu-one": Model((2, 3), nn.PReLU),
    "prelu-channels": Model((4, 2, 3), lambda: nn.Sequential(nn.PReLU(4), nn.Tanh())),
    "both": Model((4,), function(both, p=4)),
    "layer-scale": Model((3, 4), function(lambda x, s, w: x + s * (x @ w).tanh(), s=4, w=(4, 4))),
    "buffer-mask": Model((4,), Masked),
    "buffer-distances": Model((4, 3), lambda: Distances(4)),
    "expand": Model((3, 4), function(tokens, token=(1, 1, 4), w=(4, 4))),
    "expand-first": Model(
        (3, 4), function(lambda x, t: torch.cat([t.expand(len(x), 3, 4), x], 2), t=4)
    ),
    "expand-inserted": Model((3, 4), function(tokens_inserted, token=(1, 1, 4), w=(4, 4))),
    "expand-as": Model(
        (3, 4), function(lambda x, t: torch.stack([x * 2, t.expand_as(x)]).sum(0), t=(3, 4))
    ),
    "broadcast-to": Model(
        (4,),
        function(
            lambda x, t, w: torch.cat([x @ w, torch.broadcast_to(t, x.shape)], 1), t=4, w=(4, 2)
        ),
    ),
    "repeat": Model(
        (4, 2), function(lambda x, t: torch.cat([x, t.repeat(len(x), 1, 1)], 1), t=(3, 2))
    ),
    "tile": Model(
        (4, 2), function(lambda x, t: torch.cat([x, torch.tile(t, (len(x), 1, 1))], 1), t=(3, 2))
    ),
    "stacked": Model(
        (4,), function(lambda x, t, w: torch.cat([torch.stack([t] * len(x)), x * w], 1), t=3, w=4)
    ),
    "repeat-queries": Model((2, 3), function(queries, q=(5, 4), w=(3, 4))),
}

test_exact = exact(ROWS)


def test_in_place_changes_of_data_that_is_not_read():
    p, x = nn.Parameter(torch.ones(3)), torch.ones(2, 3)

    def closure():
        h = x * 1.0
        y = h + p
        h.zero_()
        return F.mse_loss(y, x * 0)

    assert curvopt.compute(closure, [p], curvopt.BatchGrad()).batch_grad[p].eq(4 / 3).all()
