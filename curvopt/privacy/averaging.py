"""Averages of the weights of a private run, which cost no privacy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvopt.privacy.checks import require

Average = Callable[[Any, Any, Any], None]


def weight_average(decay: float = 0.99) -> Average:
    r"""Exponential average of weights that starts fast, for `torch.optim.swa_utils.AveragedModel`.

    .. math::
        \bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta,
        \qquad d = \min\bigl(\mathrm{decay}, \tfrac{1 + t}{10 + t}\bigr)

    after step t. The average of noisy iterates has less of the noise than the last of them; it is
    made of what has been released, so that nothing is to be accounted.

    Args:
        decay: the largest d. Default 0.99, an average over about the last hundred steps; 0.9999 is
            the paper's, for runs of thousands of steps.

    Raises:
        CurvoptError: the decay is not in [0, 1).

    Example:
        >>> from curvopt.privacy import weight_average
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = torch.nn.Linear(3, 2)
        >>> averaged = AveragedModel(model, multi_avg_fn=weight_average(0.95))
        >>> averaged.update_parameters(model)  # after every step

    References:
        De et al. 2022, Unlocking high-accuracy differentially private image classification through
        scale, arXiv 2204.13650.
    """
    require(0 <= decay < 1, "decay", decay, "must be in [0, 1)")

    @torch.no_grad()
    def average(averages: list[Tensor], weights: list[Tensor], count: Tensor | int) -> None:
        """Move the averages towards the weights, in place."""
        t = int(count)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + t) / (10 + t)))

    return average
