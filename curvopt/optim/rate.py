"""The rate that finds itself: it follows the share of signal in the momentum."""

from __future__ import annotations

import math
from typing import Any

# Logarithm of the largest rate: on a plane, or in a long warm-up, gradients agree for ever.
LARGEST = math.log(100)


def noise_of(momentum: float, step: int) -> float:
    r"""The share :math:`\rho` of an average's square in the mean square, under noise alone.

    .. math:: \rho = \frac{(1 - \mu)(1 + \mu^t)}{(1 + \mu)(1 - \mu^t)}

    Args:
        momentum: :math:`\mu`.
        step: t, the number of values averaged.
    """
    mu, t = momentum, step
    return (1 - mu) * (1 + mu**t) / ((1 + mu) * (1 - mu**t))


def adapt(state: dict[str, Any], group: dict[str, Any], gradient: float, mean: float) -> None:
    r"""Adapt the rate to the share of signal.

    .. math::
        e \leftarrow \mu e + (1 - \mu) \|g\|^2, \qquad r = \|\hat m\|^2 / \hat e, \qquad
        \gamma \leftarrow \gamma \exp \Bigl(\kappa
            \Bigl(\frac{r - \rho}{1 - \rho} - \tau\Bigr)\Bigr)

    Args:
        state: of a parameter: its ``step``, and ``energy``, ``energy_weight``, ``log_rate`` to be
            made those to come.
        group: ``momentum``, ``adaptation`` (kappa), ``lr``, and ``margin`` (tau), 0 where there is
            none.
        gradient: the square of g.
        mean: the square of its bias-corrected mean.
    """
    mu, t = group["momentum"], state["step"]
    if not math.isfinite(gradient):  # it would stay in the average for ever
        return
    # Its own weight: adaptation may have been off for a while.
    state["energy"] = mu * state.get("energy", 0.0) + (1 - mu) * gradient
    state["energy_weight"] = mu * state.get("energy_weight", 0.0) + 1 - mu
    energy, noise = state["energy"] / state["energy_weight"], noise_of(mu, t)
    if energy > 0 and noise < 1 and group["lr"] > 0:  # what stands still agrees
        signal = min(1.0, mean / energy)
        grown = (signal - noise) / (1 - noise) - group.get("margin", 0.0)
        grown *= group["adaptation"]
        state["log_rate"] = min(state.get("log_rate", 0.0) + grown, LARGEST)
