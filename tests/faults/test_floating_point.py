"""Sums that cancel in float32: a norm is bounded from above, a variance is that of the rows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests.faults.situations import Made, Pass, clipped, quiet, rows_of

SAMPLES, TOKENS, WIDTH = 16, 8, 64
NORM = 1.0


class Pooled(nn.Module):
    """A layer on tokens, then their mean: all of them have the same cotangent."""

    def __init__(self, layer, axis=1):
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x):
        return self.layer(x).mean(self.axis)


class Signed(nn.Module):
    """One word, again and again, with large weights of alternating sign."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x):
        signs = self.size * torch.tensor([1.0, -1.0] * (TOKENS // 2), dtype=self.layer.weight.dtype)
        h = self.layer(x[:, :, 0].long())
        return (h * (signs + x[:, :, 1])[:, :, None]).sum(1)


def alternating(size, n=SAMPLES):
    """Tokens that cancel but for a rest of size one."""
    signs = torch.tensor([1.0, -1.0] * (TOKENS // 2))[:, None]
    return size * signs * torch.randn(n, 1, WIDTH) + torch.randn(n, TOKENS, WIDTH)


def linear(size):
    return Pooled(nn.Linear(WIDTH, WIDTH)), alternating(size)


def without_bias(size):
    return Pooled(nn.Linear(WIDTH, WIDTH, bias=False)), alternating(size)


def matrix(size):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

        def forward(self, x):
            return (x @ self.weight).mean(1)

    return Product(), alternating(size)


def convolution(size):
    return Pooled(nn.Conv1d(WIDTH, WIDTH, 1), axis=2), alternating(size).mT.contiguous()


def embedding(size):
    x = torch.stack([torch.zeros(SAMPLES, TOKENS), torch.randn(SAMPLES, TOKENS)], 2)
    return Signed(nn.Embedding(3, WIDTH), size), x


def several_uses(size):
    """The cross terms of a layer that is used twice cancel."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x[:, 0]) + self.layer(x[:, 1])

    return Twice(), alternating(size)[:, :2].contiguous()


CANCEL = pytest.mark.parametrize(
    "build", [linear, without_bias, matrix, convolution, embedding, several_uses]
)
SIZES = pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e4])


def problem(build, size, seed=0):
    """In float32, and the same numbers in float64 for the oracle."""
    torch.manual_seed(seed)
    net, x = build(size)
    net, x = net.float(), x.float()
    t = (30 * torch.randn(len(x), WIDTH)).float()
    exact = copy.deepcopy(net).double()
    m = Made(list(net.parameters()), lambda x, t: F.mse_loss(net(x), t), [Pass((x, t))])
    oracle = Made(list(exact.parameters()), lambda x, t: F.mse_loss(exact(x), t), [])
    rows = list(rows_of(oracle, (x.double(), t.double())).values())
    return m, x, t, rows


def norms_of(rows):
    return torch.cat([r.flatten(1) for r in rows], 1).norm(dim=1)


def tolerance(size):
    """The rows themselves are rounded: by the unit, times what cancels."""
    return max(1e-4, 4e-7 * size * TOKENS)


def close(mine, expected, rtol):
    error = (mine.double() - expected).abs().max()
    assert error <= rtol * expected.abs().max(), f"{error:.3g} of {expected.abs().max():.3g}"


@SIZES
@CANCEL
def test_squared_norms(build, size):
    m, x, t, rows = problem(build, size)
    result = quiet(
        curvopt.compute,
        lambda: m.loss(x, t),
        m.params,
        curvopt.BatchL2Grad(),
        curvopt.SumGradSquared(),
        curvopt.Variance(),
    )
    for p, r in zip(m.params, rows, strict=True):
        squares, rtol = r.flatten(1).square().sum(1), 3 * tolerance(size)
        assert (result.batch_l2[p] >= 0).all()
        error = (result.batch_l2[p].double() - squares).abs() / squares
        assert (error <= rtol).all(), f"{error.max():.3g}"
        close(result.sum_grad_squared[p], r.square().sum(0), rtol)
        close(result.variance[p], r.var(0, correction=0), rtol)


def step(opt, m, x, t):
    quiet(opt.step, lambda: m.loss(x, t))
    return [p.grad.double() for p in m.params]


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@SIZES
@CANCEL
def test_one_sample_moves_the_clipped_sum_by_the_norm_at_most(build, size, clipping):
    m, x, t, _ = problem(build, size)
    opt = curvopt.DPSGD(
        m.params, 0.0, noise_multiplier=0.0, max_grad_norm=NORM, expected_batch_size=1,
        clipping=clipping,
    )  # fmt: skip
    whole = step(opt, m, x, t)
    for n in range(0, len(x), 5):
        keep = [k for k in range(len(x)) if k != n]
        rest = step(opt, m, x[keep], t[keep])
        change = sum((a - b).square().sum() for a, b in zip(whole, rest, strict=True)).sqrt()
        # The sum is rounded as well, where a row's terms cancel.
        assert change <= NORM * (1 + tolerance(size)), f"{change / NORM:.4g} C"
    assert opt.nonfinite_samples == 0


@SIZES
@CANCEL
def test_clipped_sum(build, size):
    m, x, t, rows = problem(build, size)
    result = quiet(curvopt.compute, lambda: m.loss(x, t), m.params, curvopt.ClippedGradSum(NORM))
    expected = clipped(dict(zip(m.params, rows, strict=True)), NORM)
    for p in m.params:
        close(result.clipped_grad_sum[p], expected[p], 3 * tolerance(size))


@pytest.mark.parametrize("seed", range(6))
def test_no_sample_is_dropped_as_not_finite(seed):
    """480 samples in all, of which 45 had a negative square."""
    m, x, t, rows = problem(lambda size: (linear(size)[0], alternating(size, 80)), 1e3, seed)
    opt = curvopt.DPSGD(
        m.params, 0.0, noise_multiplier=0.0, max_grad_norm=NORM, expected_batch_size=1
    )
    step(opt, m, x, t)
    assert opt.nonfinite_samples == 0
    norms = norms_of(rows)
    assert ((opt.norms.double() - norms).abs() <= 3 * tolerance(1e3) * norms).all()


# A variance beside a large mean.


def agreeing(make, shape, spread=1e-3):
    """Outputs of zero and targets that hardly differ, on inputs that are all alike."""
    torch.manual_seed(0)
    net = make().float()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    x = torch.full((SAMPLES, *shape), 200.0, dtype=torch.float32)
    with torch.no_grad():
        z = net(x)
    t = (100 + spread * torch.randn(z.shape)).float()
    return net, x, t


ALIKE = {
    "linear": lambda: agreeing(lambda: nn.Linear(20, 10), (20,)),
    "tokens": lambda: agreeing(lambda: nn.Linear(20, 10), (3, 20)),
    "convolution": lambda: agreeing(lambda: nn.Conv2d(2, 3, 2), (2, 4, 4)),
    "bias": lambda: agreeing(lambda: nn.Sequential(nn.Linear(4, 4)), (4,)),
    "wide-spread": lambda: agreeing(lambda: nn.Linear(20, 10), (20,), spread=10.0),
}


@pytest.mark.parametrize("name", ALIKE)
def test_variance_of_rows_that_agree(name):
    net, x, t = ALIKE[name]()
    params = list(net.parameters())
    exact = copy.deepcopy(net).double()
    oracle = Made(list(exact.parameters()), lambda x, t: F.mse_loss(exact(x), t), [])
    rows = rows_of(oracle, (x.double(), t.double())).values()
    result = quiet(curvopt.compute, lambda: F.mse_loss(net(x), t), params, curvopt.Variance())
    for p, r in zip(params, rows, strict=True):
        assert (result.variance[p] >= 0).all()
        close(result.variance[p], r.var(0, correction=0), 0.05)
