"""A clipping norm that follows a quantile of the gradient norms, at an accounted cost."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from curvopt.privacy.checks import require
from curvopt.privacy.noise import GaussianNoise


class QuantileClipping:
    r"""Move the clipping norm C towards a quantile of the per-sample gradient norms.

    Beside the clipped sum, each step releases how many samples have a norm of at most C, under
    noise of its own, and moves C geometrically:

    .. math::
        \bar b = \tfrac12 + \tfrac1B\Bigl(\sum_n (b_n - \tfrac12) + N(0, \sigma_b^2)\Bigr),
        \quad b_n = [\|g_n\| \le C], \qquad C \leftarrow C \exp(-\eta (\bar b - \gamma)).

    The shift by one half bounds a sample's contribution to the count by 1/2. The pair (clipped sum
    with noise :math:`\sigma_g C`, count with noise :math:`\sigma_b`) is one Gaussian mechanism of
    noise multiplier :math:`\sigma`, which is what the accountant sees, if

    .. math:: \sigma_g^{-2} = \sigma^{-2} - (2 \sigma_b)^{-2}.

    So the gradient gets a little more noise than without it: that is the cost.

    Args:
        max_grad_norm: C at the first step. Rather too small than too large: it grows fast.
        expected_batch_size: B, the divisor, as in the optimizer; never the size of a batch.
        quantile: :math:`\gamma`, the share of the samples to leave unclipped. Default: the median,
            which the paper found good throughout.
        learning_rate: :math:`\eta`. Default 0.2, the paper's: C moves by at most a tenth or so a
            step.
        count_noise_multiplier: :math:`\sigma_b`, in samples. Default B / 20, the paper's.

    Attributes:
        max_grad_norm: C for the next step.

    Raises:
        CurvoptError: An argument is out of range.

    Example:
        >>> from curvopt.privacy import QuantileClipping
        >>> clipping = QuantileClipping(0.1, expected_batch_size=256)
        >>> round(clipping.gradient_noise_multiplier(1.0), 4)  # added to the gradient for sigma = 1
        1.0008

    References:
        Andrew et al. 2021, Differentially private learning with adaptive clipping,
        arXiv 1905.03871.
    """

    def __init__(
        self,
        max_grad_norm: float = 0.1,
        *,
        expected_batch_size: float,
        quantile: float = 0.5,
        learning_rate: float = 0.2,
        count_noise_multiplier: float | None = None,
    ) -> None:
        if count_noise_multiplier is None:
            count_noise_multiplier = expected_batch_size / 20
        for name, value in {
            "clipping norm": max_grad_norm,
            "expected batch size": expected_batch_size,
            "learning rate": learning_rate,
            "count noise multiplier": count_noise_multiplier,
        }.items():
            require(0 < value < math.inf, name, value, "must be positive and finite")
        require(0 <= quantile <= 1, "quantile", quantile, "must be in [0, 1]")
        self.max_grad_norm = float(max_grad_norm)
        self.expected_batch_size = expected_batch_size
        self.quantile = quantile
        self.learning_rate = learning_rate
        self.count_noise_multiplier = count_noise_multiplier

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        r""":math:`\sigma_g` to add to the gradient, so that the whole step is worth :math:`\sigma`.

        Args:
            noise_multiplier: :math:`\sigma`, which is accounted; 0 stays 0.

        Raises:
            CurvoptError: The count alone would cost more than the step may
                (:math:`2 \sigma_b \le \sigma`).
        """
        count = 2 * self.count_noise_multiplier
        require(
            0 <= noise_multiplier < count,
            "noise multiplier",
            noise_multiplier,
            f"with quantile clipping it must be in [0, 2 count_noise_multiplier = {count:g})",
        )
        if noise_multiplier == 0:
            return 0.0
        return 1 / math.sqrt(noise_multiplier**-2 - count**-2)

    def update(self, norms: Tensor, noise: GaussianNoise) -> None:
        """Release the noisy count of a logical batch and move C.

        Args:
            norms: ``[N]``, the norms of all per-sample gradients of the logical batch before
                clipping (of all micro-batches and all ranks; ``[0]`` for an empty batch). One that
                is not finite counts as clipped.
            noise: The run's noise, on the device of ``norms``.
        """
        within = (norms <= self.max_grad_norm).float() - 0.5
        count = within.sum()
        count += noise(count, self.count_noise_multiplier)
        share = 0.5 + count.item() / self.expected_batch_size
        self.max_grad_norm *= math.exp(-self.learning_rate * (share - self.quantile))

    def state_dict(self) -> dict[str, Any]:
        """The current clipping norm."""
        return {"max_grad_norm": self.max_grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved clipping norm."""
        self.max_grad_norm = float(state["max_grad_norm"])
