"""Noise: its law, its generators and their state; the schedules."""

import io
import math

import pytest
import torch

from curvopt.errors import CurvoptError
from curvopt.privacy import (
    CosineSchedule,
    ExponentialSchedule,
    GaussianNoise,
    LinearSchedule,
    PiecewiseSchedule,
    gaussian_noise,
    value_at,
)
from curvopt.privacy.noise import generator_from_key


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_gaussian(secure):
    count, std = 200_000, 2.5
    noise = gaussian_noise((count,), std, generator=seeded(), secure=secure).double()
    assert abs(noise.mean()) < 4.5 * std / count**0.5
    assert noise.std() / std == pytest.approx(1, abs=4.5 / (2 * count) ** 0.5)
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed once in a thousand
    ordered = noise.sort().values / std
    ranks = torch.arange(1, count + 1) / count
    assert (torch.special.ndtr(ordered) - ranks).abs().max() < 1.95 / count**0.5
    halves = noise.reshape(2, -1)
    assert abs((halves[0] * halves[1]).mean()) < 4.5 * std**2 / (count / 2) ** 0.5


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_noise_is_in_float32_at_least(dtype, expected):
    like = torch.zeros(3, 4, dtype=dtype)
    assert gaussian_noise(like, 1.0).dtype == expected
    assert gaussian_noise(like, 1.0).shape == like.shape
    assert gaussian_noise(like, 1.0, secure=True).dtype == torch.float64


def test_no_noise_is_zero():
    assert not gaussian_noise((5,), 0.0).any()
    assert not gaussian_noise((5,), 0.0, secure=True).any()


@pytest.mark.parametrize("std", [-1.0, math.inf, math.nan])
def test_bad_standard_deviations_are_refused(std):
    with pytest.raises(CurvoptError, match=f"Invalid noise standard deviation: {std}"):
        gaussian_noise((5,), std)


def test_noise_is_its_own():
    like = torch.zeros(100)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = GaussianNoise(), GaussianNoise()
    drawn = [first(like, 1.0), first(like, 1.0), second(like, 1.0), gaussian_noise(like, 1.0)]
    assert torch.equal(torch.get_rng_state(), before)
    for i, one in enumerate(drawn):
        assert all(not torch.equal(one, other) for other in drawn[:i])


@pytest.mark.parametrize("generator", [None, 5])
def test_noise_goes_on_after_a_weights_only_round_trip(generator):
    like = torch.zeros(7)  # below 16 torch draws pairs and keeps the second for later
    noise = GaussianNoise(None if generator is None else seeded(generator))
    before = noise(like, 1.0)
    file = io.BytesIO()
    torch.save(noise.state_dict(), file)
    file.seek(0)
    after = noise(like, 1.0)
    restored = GaussianNoise()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(like, 1.0), after)
    assert not torch.equal(before, after)


def test_keys_count_whole():
    # torch's own seeds are equal modulo 2^32
    same = [torch.randn(20, generator=seeded(1 + (k << 32))) for k in range(2)]
    assert torch.equal(*same)
    keys = [b"a" * 31 + b"b", b"a" * 31 + b"c", b"a" * 31 + b"b"]
    first, second, third = (torch.randn(20, generator=generator_from_key(key)) for key in keys)
    assert torch.equal(first, third)
    assert not torch.isin(first, second).any()


def test_generators_from_keys_are_uniform():
    draws = torch.stack(
        [
            torch.rand(64, generator=generator_from_key(bytes([k, j])))
            for k in range(256)
            for j in (0, 1)
        ]
    )
    error = 4.5 / (12 * len(draws)) ** 0.5
    assert (draws.mean(0) - 0.5).abs().max() < error  # position by position, over keys


def test_schedules():
    assert [LinearSchedule(2.0, 1.0, 4)(t) for t in range(6)] == [2, 1.75, 1.5, 1.25, 1, 1]
    assert [LinearSchedule(2.0, 1.0, 4, every=2)(t) for t in range(5)] == [2, 2, 1.5, 1.5, 1]
    assert [CosineSchedule(2.0, 1.0, 4)(t) for t in (0, 2, 4, 9)] == pytest.approx([2, 1.5, 1, 1])
    assert [ExponentialSchedule(8.0, 0.5, every=3)(t) for t in (0, 2, 3, 8)] == [8, 8, 4, 2]
    pieces = PiecewiseSchedule({0: 1.0, 5: LinearSchedule(2.0, 1.0, 4), 20: lambda step: step})
    assert [pieces(t) for t in (0, 4, 5, 7, 19, 23)] == [1, 1, 2, 1.5, 1, 3]
    assert (value_at(1.5, 3), value_at(pieces, 7)) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LinearSchedule(1.0, 2.0, 0), "Invalid schedule length: 0"),
        (lambda: CosineSchedule(1.0, 2.0, 5, every=0), "Invalid schedule interval: 0"),
        (lambda: ExponentialSchedule(1.0, 0.5, every=0), "Invalid schedule interval: 0"),
        (lambda: PiecewiseSchedule({1: 1.0}), r"Invalid pieces: .*\(one must start at step 0"),
    ],
)
def test_bad_schedules_are_refused(wrong, message):
    with pytest.raises(CurvoptError, match=message):
        wrong()


def test_each_dtype_has_noise_of_its_own_precision():
    """Whatever was drawn before from the same stream."""
    totals = [torch.zeros(16) for _ in range(8)]
    totals += [torch.zeros(8, dtype=torch.float64) for _ in range(8)]
    GaussianNoise(torch.Generator().manual_seed(0)).add_to(totals, std=1.0, size=1.0)
    for total in totals[8:]:
        assert (total != total.float()).any()
