"""The mean or sum that ends a loss written by hand: rows, but no curvature of its own."""

from __future__ import annotations

from torch import Tensor

from curvopt.axes.layout import Layout
from curvopt.errors import CurvoptError
from curvopt.losses.base import Loss


class Reduction(Loss):
    """``mean()`` or ``sum()`` of a tensor, over all of its elements or some of its axes."""

    def __init__(self, output: Tensor, value: Tensor, reduction: str, name: str = ""):
        super().__init__(output, value, reduction)
        self.name = name or f"{reduction}()"

    def share(self, layout: Layout) -> float | Tensor:
        """Told by the way to the loss, on which the mean or sum is a step."""
        return 1.0

    def curvature(self) -> Tensor:
        raise CurvoptError(
            f"the loss ends in {self.name} and is none that curvopt knows, so the Hessian of the "
            "loss in the model's output is unknown; use a loss of torch.nn.functional "
            "(cross_entropy, mse_loss, ...), or have the closure return (loss, output)"
        )

    def apply_root(self, coefficients: Tensor) -> Tensor:
        raise NotImplementedError  # never asked: `curvature` comes first
