"""Losses of single elements: squared error and binary cross entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.losses.base import Loss, reduction_of
from curvopt.losses.registry import loss


class SquaredError(Loss):
    """``w (z - y)^2`` per element; its second derivative is ``2 w``."""

    name = "mse_loss"

    def __init__(self, output: Tensor, value: Tensor, reduction: str, weight: Tensor | None = None):
        super().__init__(output, value, reduction)
        self.weight = weight

    def curvature(self) -> Tensor:
        two = self.output.new_full((), 2.0)
        return two if self.weight is None else two * self.weight

    def apply_root(self, coefficients: Tensor) -> Tensor:
        return coefficients.squeeze(-1)

    def sample_labels(self, columns: int, generator: torch.Generator | None) -> Tensor:
        shape, like = (columns, *self.output.shape), self.output
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


class BinaryCrossEntropy(Loss):
    """``-w (a y log s + (1 - y) log(1 - s))`` per element, s the sigmoid of the logit.

    With positive weight a its second derivative is ``w (a y + 1 - y) s (1 - s)``.
    """

    name = "binary_cross_entropy_with_logits"

    def __init__(
        self,
        output: Tensor,
        value: Tensor,
        reduction: str,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
    ):
        super().__init__(output, value, reduction)
        self.target, self.weight, self.pos_weight = target, weight, pos_weight

    def curvature(self) -> Tensor:
        factor = torch.ones_like(self.output)
        if self.pos_weight is not None:
            factor = self.pos_weight * self.target + 1 - self.target
        return factor if self.weight is None else factor * self.weight

    def _probability(self) -> Tensor:
        return self.z.sigmoid()

    def apply_root(self, coefficients: Tensor) -> Tensor:
        s = self._probability()
        return coefficients.squeeze(-1) * (s * (1 - s)).sqrt()

    def sample_labels(self, columns: int, generator: torch.Generator | None) -> Tensor:
        s = self._probability().expand(columns, *self.output.shape)
        return s - torch.bernoulli(s, generator=generator)


@loss(F.mse_loss)
def mse_loss(
    output: Tensor, value: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None,
    reduction: str = "mean", weight: Tensor | None = None,
) -> SquaredError:  # fmt: skip
    """Squared error."""
    reduction = reduction_of(dict(size_average=size_average, reduce=reduce, reduction=reduction))
    same_shape("mse_loss", output, target)
    if weight is not None and reduction == "mean":
        raise CurvoptError("mse_loss with weight= and reduction='mean' divides by the weights' sum")
    return SquaredError(output, value, reduction, weight)


@loss(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    output: Tensor, value: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> BinaryCrossEntropy:  # fmt: skip
    """Binary cross entropy of logits."""
    reduction = reduction_of(dict(size_average=size_average, reduce=reduce, reduction=reduction))
    same_shape("binary_cross_entropy_with_logits", output, target)
    return BinaryCrossEntropy(output, value, reduction, target, weight, pos_weight)


def same_shape(name: str, output: Tensor, target: Tensor) -> None:
    """Refuse a target that broadcasts."""
    if output.shape != target.shape:
        raise CurvoptError(
            f"{name} got an output of shape {list(output.shape)} and a target of shape "
            f"{list(target.shape)}; broadcasting would mix samples: give both one shape"
        )
