"""Quantile clipping: where it goes and what it costs."""

import math

import pytest
import torch

from curvopt.errors import CurvoptError
from curvopt.privacy import GaussianNoise, QuantileClipping


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_norm_finds_its_quantile(quantile, start):
    generator = torch.Generator().manual_seed(0)
    noise = GaussianNoise(torch.Generator().manual_seed(1))
    clipping = QuantileClipping(start, expected_batch_size=200, quantile=quantile)
    visited = []
    for _ in range(300):
        size = int(torch.poisson(torch.tensor(200.0), generator=generator))
        norms = torch.empty(size).log_normal_(0, 1, generator=generator)
        clipping.update(norms, noise)
        visited.append(clipping.max_grad_norm)
    wanted = math.exp(torch.special.ndtri(torch.tensor(quantile)).item())
    assert sum(visited[-100:]) / 100 == pytest.approx(wanted, rel=0.1)


def test_noise_of_gradient_and_count_make_up_the_accounted_noise():
    clipping = QuantileClipping(1.0, expected_batch_size=256)
    assert clipping.count_noise_multiplier == 12.8
    sigma_g = clipping.gradient_noise_multiplier(1.1)
    # One sample moves the clipped sum by C and the count by 1/2: in units of the noise
    shift = math.hypot(1 / sigma_g, 0.5 / clipping.count_noise_multiplier)
    assert 1 / shift == pytest.approx(1.1, rel=1e-12)
    assert clipping.gradient_noise_multiplier(0.0) == 0


@pytest.mark.parametrize("norms", [[], [0.5], [2.0], [math.inf], [math.nan]])
def test_one_sample_moves_the_count_by_a_half(norms):
    def moved(values):
        clipping = QuantileClipping(
            1.0, expected_batch_size=1, learning_rate=1.0, count_noise_multiplier=1.0
        )
        clipping.update(torch.tensor(values), GaussianNoise(torch.Generator().manual_seed(0)))
        return math.log(clipping.max_grad_norm)

    expected = {0: 0.0, 1: -0.5 if norms == [0.5] else 0.5}[len(norms)]
    assert moved(norms) - moved([]) == pytest.approx(expected, abs=1e-6)


def test_state_round_trip():
    clipping, noise = QuantileClipping(1.0, expected_batch_size=10), GaussianNoise()
    clipping.update(torch.rand(9), noise)
    restored = QuantileClipping(1.0, expected_batch_size=10)
    restored.load_state_dict(clipping.state_dict())
    assert restored.max_grad_norm == clipping.max_grad_norm != 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "Invalid clipping norm: 0.0"),
        ({"expected_batch_size": 0}, "Invalid expected batch size: 0"),
        ({"quantile": 1.5}, "Invalid quantile: 1.5"),
        ({"learning_rate": -1}, "Invalid learning rate: -1"),
        ({"count_noise_multiplier": 0.0}, "Invalid count noise multiplier: 0.0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(CurvoptError, match=message):
        QuantileClipping(**{"expected_batch_size": 10, **options})


def test_a_count_dearer_than_the_step_is_refused():
    clipping = QuantileClipping(1.0, expected_batch_size=10, count_noise_multiplier=0.5)
    with pytest.raises(CurvoptError, match=r"Invalid noise multiplier: 1.0 \(with quantile"):
        clipping.gradient_noise_multiplier(1.0)
