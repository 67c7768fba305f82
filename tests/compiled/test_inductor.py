"""Ten steps compiled by Inductor are the ten eager steps: five models, in double precision.

In float32 a compiled step rounds otherwise, and where an activation lies within rounding of zero a
ReLU may let it pass in one and not in the other: there two eager runs from weights that differ in
their last bits part as well.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.compiled.capture import inductor

from .common import Both, batches, cross_entropy, network
from .test_equal import Attention, next_word, words


def variance(params):
    return curvopt.VarianceAdaptiveSGD(params, 0.05, variance_every=1)


def private(params):
    exact = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, "expected_batch_size": 4}
    return curvopt.DPSGD(params, 0.1, **exact)


def run(model, make, loss, data, rtol=1e-9):
    both = Both(model.double(), make, loss, inductor)
    both.run(data)
    both.check(rtol=rtol, atol=rtol / 100, compiled=9)


def test_mlp():
    """All matrices by their rows."""

    def make(params):
        return curvopt.PolarOptimizer(params, 1e-2, eps=0.3)

    run(network(sizes=(6, 5, 3)), make, cross_entropy, batches(10))


def test_2c2d():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)),
    )

    data = ((x.view(4, 1, 14, 14), y) for x, y in batches(10, inputs=196))
    run(model, variance, cross_entropy, data)


def test_transformer():
    torch.manual_seed(0)
    run(Attention(), variance, next_word, words(10))


def test_gpt2_as_it_comes():
    """Its own loss is computed in float32."""
    transformers = pytest.importorskip("transformers", reason="it is of the dev extra alone")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=7, n_positions=8, attn_pdrop=0, embd_pdrop=0,
        resid_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)

    run(model, private, lambda m, x, y: m(x, labels=y).loss, words(10), 1e-6)


def test_lstm():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)])

    def loss(model, x, y):
        return F.cross_entropy(model[1](model[0](x.view(4, 2, 3))[0][:, -1]), y)

    def make(params):
        return curvopt.DiagGGNOptimizer(params, 1e-2, curvature_every=1, estimator="exact")

    run(model, make, loss, batches(10))
