"""A statistical audit: what two neighbouring batches can be told apart by, against what is claimed.

Everything runs as a user runs it: model, loss, closure, step. An attacker who knows both batches
looks at the released gradients along the sample's own direction, and guesses which batch it was;
his hits and false alarms bound epsilon from below. What breaks the guarantee must be caught.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import nn

import curvopt
from curvopt.privacy import GaussianNoise, PrivacyLedger
from curvopt.structures import numerics

SIGMA, CLIP, DELTA, TRIALS = 1.0, 0.1, 0.01, 250


class Tokens(nn.Module):
    """A linear map of the tokens of a text, their sum, and a readout."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.map, self.readout = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.readout(self.map(self.words(x)).tanh().sum(1))


def dense():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(6, 4)


def images():
    layers = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    return nn.Sequential(*layers), torch.randn(6, 1, 6, 6)


def texts():
    return Tokens(), torch.randint(9, (6, 5))


MODELS = {"dense": dense, "images": images, "texts": texts}


def make(name):
    """A model, and a batch whose first sample stands out."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    y = torch.arange(len(x)) % 3
    if name != "texts":
        x[0] *= 3
    return model, x, y


def claimed():
    ledger = PrivacyLedger()
    ledger.log(SIGMA, 1.0, sampler="none")
    return ledger.epsilon(DELTA)


def audited(model, loss, whole, without, trials=TRIALS, **options):
    """A lower bound of epsilon, from telling the two batches apart.

    Args:
        model: the model.
        loss: of a batch, `loss(*batch)`.
        whole: the batch with the sample.
        without: the batch without it.
        trials: steps on either.
        options: of the optimizer.
    """
    params = list(model.parameters())

    def optimizer(sigma, seed=0):
        model.zero_grad()
        return curvopt.DPSGD(
            params, 0.0, noise_multiplier=sigma, max_grad_norm=CLIP, expected_batch_size=1,
            generator=torch.Generator().manual_seed(seed), **options,
        )  # fmt: skip

    def step(opt, batch):
        opt.step(lambda: loss(*batch))
        return torch.cat([p.grad.flatten() for p in params]).double()

    silent = optimizer(0.0)
    first, second = step(silent, whole), step(silent, without)
    direction = (first - second) / (first - second).norm()
    noisy = optimizer(SIGMA)
    with_it, without_it = (
        torch.stack([(step(noisy, batch) - second) @ direction for _ in range(trials)])
        for batch in (whole, without)
    )
    bounds = []
    for threshold in CLIP * torch.tensor([1.0, 1.5, 2.0]):
        hits = int((with_it > threshold).sum())
        false = int((without_it > threshold).sum())
        hit = beta.ppf(0.01, hits, trials - hits + 1) if hits else 0.0
        alarm = beta.ppf(0.99, false + 1, trials - false) if false < trials else 1.0
        bounds.append(math.log(max(hit - DELTA, 1e-9) / alarm))
    return max(bounds)


def plain(model):
    return lambda x, y: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_can_be_told_apart_no_better_than_is_claimed(name):
    model, x, y = make(name)
    found = audited(model, plain(model), (x, y), (x[1:], y[1:]))
    assert 0.2 * claimed() < found < claimed()


def test_half_of_the_noise_is_caught(monkeypatch):
    model, x, y = make("dense")
    add_to = GaussianNoise.add_to
    monkeypatch.setattr(
        GaussianNoise, "add_to", lambda self, sums, std, size: add_to(self, sums, std / 2, size)
    )
    batches = (x, y), (x[1:], y[1:])
    assert audited(model, plain(model), *batches, trials=500) > claimed()


def test_a_coupled_sample_is_caught():
    """One sample decides about the loss of all, by a number that leaves torch."""
    model, x, y = make("dense")

    def loss(x, y):
        sign = 1.0 if float(x.abs().max()) > 1 else -1.0
        return F.cross_entropy(sign * model(x), y)

    # The others agree, so that their sum turns around.
    x[1:], y[1:] = 0.3 * x[1], y[1]
    assert audited(model, loss, (x, y), (x[1:], y[1:])) > claimed()


def test_a_norm_that_is_not_bounded_is_caught(monkeypatch):
    """Tokens of size 1e4 that add up to almost nothing: in float32 their Gram sum cancels."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    signs = torch.tensor([1.0, -1.0] * 4)[:, None]
    x = 0.1 * torch.randn(4, 8, 64)
    x[0] = 1e4 * signs * torch.randn(64) + torch.randn(8, 64)

    def loss(x):
        return model(x).sum((1, 2)).mean()

    assert audited(model, loss, (x,), (x[1:],), trials=150) < claimed()
    monkeypatch.setattr(
        numerics, "_below", lambda values, bound, share: torch.zeros_like(values) > 0
    )
    assert audited(model, loss, (x,), (x[1:],), trials=150) > claimed()


def test_a_repeated_sample_is_caught():
    """What a loader that draws with replacement does."""
    model, x, y = make("dense")
    rows = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5])
    assert audited(model, plain(model), (x[rows], y[rows]), (x[1:], y[1:])) > claimed()
