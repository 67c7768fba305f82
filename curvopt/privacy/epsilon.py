"""The epsilon of noisy releases, by Google's ``dp-accounting``.

It is imported when an epsilon is asked for, and not before.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

Accountant = Literal["pld", "rdp"]
# (noise multiplier, Poisson rate, how often); the rate 1 means that nothing is amplified.
Releases = tuple[tuple[float, float, int], ...]


def accounting() -> Any:
    """The package ``dp-accounting``, or how to have it."""
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError(
            "Privacy accounting needs dp-accounting: pip install dp-accounting, "
            "or 'curvopt-for-pytorch[privacy]'"
        ) from error
    return dp_accounting


def on_grid(counts: dict[tuple[float, float], int]) -> dict[tuple[float, float], int]:
    """Less noise and larger rates, to a grid of 2 %: fewer kinds of release, none understated."""
    rounded: dict[tuple[float, float], int] = {}
    for (sigma, rate), count in counts.items():
        less = min(sigma, 1.02 ** math.floor(math.log(sigma, 1.02)))
        more = min(1.0, max(rate, 1.02 ** math.ceil(math.log(rate, 1.02))))
        rounded[less, more] = rounded.pop((less, more), 0) + count
    return rounded


@functools.lru_cache(maxsize=256)
def epsilon_of(releases: Releases, delta: float, accountant: Accountant) -> float:
    """Epsilon of some releases, kept for the next call."""
    if not releases:
        return 0.0
    if releases[0][0] == 0:
        return math.inf
    if accountant == "rdp":
        return _epsilon_rdp(releases, delta)
    # The support of the loss grows with 1 / sigma^2. A wider grid is coarser, still pessimistic.
    smallest = min(sigma for sigma, _, _ in releases)
    interval = 1e-4 * max(1.0, (0.4 / smallest) ** 2)
    return float(_composed(releases, interval).get_epsilon_for_delta(delta))


def _epsilon_rdp(releases: Releases, delta: float) -> float:
    dp = accounting()
    accountant = dp.rdp.RdpAccountant()
    for sigma, rate, count in releases:
        event = dp.GaussianDpEvent(sigma)
        accountant.compose(event if rate == 1 else dp.PoissonSampledDpEvent(rate, event), count)
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=4)
def _composed(releases: Releases, interval: float) -> Any:
    """The loss distribution of all releases; a growing last one meets the cached others."""
    *settled, (sigma, rate, count) = releases
    last = _loss_distribution(sigma, rate, interval).self_compose(count)
    return _composed(tuple(settled), interval).compose(last) if settled else last


@functools.lru_cache(maxsize=4)
def _loss_distribution(sigma: float, rate: float, interval: float) -> Any:
    """The privacy loss of one release, in both directions of add and remove."""
    distributions = accounting().pld.privacy_loss_distribution
    return distributions.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=interval
    )
