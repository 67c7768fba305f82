"""Variances that are small beside the mean, in single precision, against rows in double."""

import pytest
import torch

import curvopt
from curvopt.structures import (
    Conv,
    Dense,
    Disjoint,
    Folded,
    Lookup,
    Outer,
    Permuted,
    Pulled,
    Scale,
    Shift,
    Total,
    base,
    total,
)
from tests.oracles import assert_close

N = 32


def near(*shape, size=30.0, spread=0.1, axis=0):
    """Samples that hardly differ."""
    value = size * (torch.randn(shape) + 3).narrow(axis, 0, 1)
    return value + spread * torch.randn(shape)


def outer(tokens, groups=1, **options):
    left, right = near(1, N, groups, tokens, 5, axis=1), near(N, groups, tokens, 6)
    shape = (5 * groups, 6) if not options else (6 * groups, 5)
    return Outer(left, right, torch.Size(shape), **options)


def conv(size, spread=0.1):
    shape = torch.Size([3, 2, 3])
    cotangent = near(1, N, 1, 3, size - 2, axis=1, spread=spread)
    return Conv(cotangent, near(N, 1, 2, size, spread=spread), shape, [1], [0], [1], 1)


def lookup():
    values = near(1, N, 3, 4, axis=1)
    return Lookup(values, torch.tensor([[1, 1, 2]]).expand(N, 3), torch.Size([5, 4]))


def some_looked_up():
    made = lookup()
    made.indices = made.indices.clone()
    made.indices[: N // 4] = 4
    return made


def pulled(isometry):
    parameter = torch.randn(3, 4, requires_grad=True)
    value = parameter.t() if isometry else parameter * 2.0
    inner = Dense(near(1, N, *value.shape, axis=1))
    return Pulled(inner, value, parameter, isometry=isometry)


STRUCTURES = {
    "dense": lambda: Dense(near(1, N, 4, 3, axis=1)),
    "outer": lambda: outer(1),
    "outer-groups": lambda: outer(1, groups=2),
    "outer-transposed": lambda: outer(1, groups=2, transposed=True),
    "outer-two-tokens": lambda: outer(2, groups=2),
    "outer-tokens": lambda: outer(4),
    "outer-many-tokens": lambda: outer(7),
    "outer-tokens-that-cancel": lambda: cancelling([1]),
    "outer-tokens-that-all-cancel": lambda: cancelling([0, 1, 2, 3, 4]),
    "outer-one-factor": lambda: Outer(
        near(1, N, 1, 1, 5, axis=1), torch.ones(N, 1, 1, 6), torch.Size([5, 6])
    ),
    "outer-same-product": lambda: same_product(),
    "conv": lambda: conv(8),
    "conv-long": lambda: conv(100, spread=1.0),
    "lookup": lookup,
    "lookup-some": some_looked_up,
    "shift": lambda: Shift(near(1, N, 2, 4, axis=1), torch.Size([4]), (1, 4)),
    "scale": lambda: Scale(near(1, N, 2, 4, axis=1), near(N, 2, 4), torch.Size([4]), (1, 4)),
    "folded": lambda: Folded(outer(4), 1),
    "permuted": lambda: Permuted(outer(1), [1, 0], torch.Size([6, 5])),
    "pulled": lambda: pulled(True),
    "pulled-times-two": lambda: pulled(False),
    "total": lambda: Total([outer(1), Dense(near(1, N, 5, 6, axis=1))]),
    "tied": lambda: total(
        [
            lookup(),
            Outer(near(1, N, 1, 2, 5, axis=1), near(N, 1, 2, 4), torch.Size([5, 4])),
        ]
    ),
    "disjoint": lambda: Disjoint([pulled(True)]),
}


def same_product():
    """Both factors differ, and their product does not."""
    length = torch.rand(N, 1, 1, 1) + 0.5
    left = 3 + torch.randn(5) + 1e-2 * torch.randn(1, N, 1, 1, 5)
    return Outer(left / length, (3 + torch.randn(6)) * length, torch.Size([5, 6]))


def cancelling(outputs):
    """Two tokens that are nearly the same, with opposite cotangents of some outputs."""
    left, right = near(1, N, 1, 1, 5, axis=1), near(N, 1, 1, 6)
    signs = torch.ones(5)
    signs[outputs] = -1
    more = 1 + 3e-2 * torch.rand(N, 1, 1, 1)
    left = torch.cat([left, signs * left * more], 3)
    return Outer(left, torch.cat([right, right], 2), torch.Size([5, 6]))


@pytest.mark.parametrize("block", [base.BLOCK, 1])
@pytest.mark.parametrize("name", STRUCTURES)
def test_scatter(name, block, monkeypatch):
    monkeypatch.setattr(base, "BLOCK", block)
    torch.manual_seed(0)
    structure = STRUCTURES[name]()
    sums, scatter = structure.moments(0.5)
    rows = structure.wide(range(N))[0].double() / 2
    truth = (rows - rows.mean(0)).square().sum(0)
    worst = (truth / rows.square().sum(0).clamp(min=1e-9)).max()
    assert (
        worst < 1e-3 or name == "lookup-some" or "cancel" in name
    )  # a difference of moments would be rounding
    assert (scatter >= 0).all()
    assert_close(scatter.double(), truth, 1e-4)
    assert ((scatter - truth).abs() <= 5e-4 * truth + 1e-12).all()  # each element too
    assert_close(sums.double(), rows.sum(0), 1e-6)


@pytest.mark.parametrize("name", STRUCTURES)
def test_samples_that_are_the_same(name):
    torch.manual_seed(0)
    structure = STRUCTURES[name]().take([3] * 7)
    rows = structure.form()[0]
    assert (structure.moments()[1] >= 0).all()
    assert structure.moments()[1].max() < 1e-10 * rows.square().max()


LAYERS = {
    "linear": lambda: (torch.nn.Linear(5, 4), (5,)),
    "tokens": lambda: (torch.nn.Linear(5, 4), (3, 5)),
    "conv": lambda: (torch.nn.Conv2d(2, 3, 3), (2, 6, 6)),
    "norm": lambda: (torch.nn.LayerNorm(5), (5,)),
}


def variance(model, x, offset):
    """Of the loss's gradient, whose cotangents have an offset."""

    def loss():
        output = model(x)
        return ((0.5 * output + offset) * output).flatten(1).sum(1).mean()

    return curvopt.compute(loss, model.parameters(), curvopt.Variance()).variance


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("layer", LAYERS)
def test_variance_of_samples_that_hardly_differ(layer, offset):
    torch.manual_seed(0)
    model, shape = LAYERS[layer]()
    x = torch.randn(1, *shape) + 5 + 1e-2 * torch.randn(N, *shape)
    found = variance(model, x, offset)
    truth = variance(model.double(), x.double(), offset)
    for mine, exact in zip(found.values(), truth.values(), strict=True):
        assert_close(mine.double(), exact, 1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_few_elements_that_hardly_differ(tokens, monkeypatch):
    """They alone are computed once more: of one output, whose tokens nearly cancel."""
    again, compute = [], Outer._spread_again

    def spy(self, scatter, where):
        again.append(int(where.sum()))
        compute(self, scatter, where)

    monkeypatch.setattr(Outer, "_spread_again", spy)
    torch.manual_seed(0)
    left, right = torch.randn(1, N, 1, tokens, 16), torch.randn(N, 1, tokens, 6)
    left[..., 3] = 10 + 1e-3 * torch.randn(1, N, 1, tokens)
    right[..., :2] = 3 + 1e-3 * torch.randn(N, 1, tokens, 2)
    if tokens % 2 == 0:
        left[..., ::2, 3] *= -1
    structure = Outer(left, right, torch.Size([16, 6]))
    rows = structure.form()[0] if tokens == 1 else structure.wide(range(N))[0]
    truth = (rows.double() - rows.double().mean(0)).square().sum(0)
    _, scatter = structure.moments()
    assert again == [2]
    assert ((scatter - truth).abs() <= 1e-3 * truth).all()
    assert_close(structure.sum_of_squares().double(), rows.double().square().sum(0), 1e-5)


def test_a_token_that_is_not_finite():
    """Terms of both signs are infinite, the squares are not: no difference of infinities."""
    left, right = torch.randn(1, N, 1, 2, 5), torch.randn(N, 1, 2, 6)
    left[0, 3, 0, 0, 2] = torch.inf
    structure = Outer(left, right, torch.Size([5, 6]))
    rows = structure.form()[0]
    torch.testing.assert_close(structure.sum_of_squares(), rows.square().sum(0))
    finite = torch.arange(5) != 2
    spread = (rows - rows.mean(0)).square().sum(0)
    torch.testing.assert_close(structure.moments()[1][finite], spread[finite])
    assert not structure.moments()[1][2].isfinite().any()
