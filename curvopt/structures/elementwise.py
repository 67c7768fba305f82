"""Biases and scales: parameters that act element by element, broadcast over the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor

from curvopt.structures.base import Structure
from curvopt.structures.numerics import squared_norm


class Shift(Structure):
    """Rows are the cotangent, summed over the axes along which the parameter was broadcast.

    Args:
        cotangent: ``[V, N, K, *rest]``.
        shape: the parameter's shape.
        aligned: the parameter's shape as it stands in ``[K, *rest]``, 1 where it was broadcast.
    """

    def __init__(self, cotangent: Tensor, shape: Size, aligned: tuple[int, ...]):
        self.shape = shape
        self.columns, self.samples = cotangent.shape[:2]
        broadcast = [
            axis
            for axis, (size, kept) in enumerate(zip(cotangent.shape[2:], aligned, strict=True), 2)
            if kept == 1 and size != 1
        ]
        reduced = cotangent.sum(broadcast) if broadcast else cotangent
        self.values = reduced.reshape(self.columns, self.samples, *shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[:, start:stop]

    def form(self) -> Tensor:
        return self.values

    def take(self, samples: Sequence[int]) -> Structure:
        return self._taken(samples, values=self.values[:, list(samples)])

    def block(self) -> int:
        return max(1, self.samples)  # nothing to form: one block

    def sum(self, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return self.values.sum((0, 1))
        return torch.tensordot(weights, self.values.sum(0), 1)

    def sum_of_squares(self) -> Tensor:
        return (self.values * self.values).sum((0, 1))

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        values = (self.values if scale == 1 else self.values * scale).flatten(0, 1)
        total = values.sum(0)
        apart = values - total / max(1, len(values))
        return total, (apart * apart).sum(0)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        return squared_norm(self.values, 2), None


class Scale(Shift):
    """Rows are cotangent times input, summed over the axes along which the parameter was broadcast.

    Args:
        cotangent: ``[V, N, K, *rest]``.
        factor: what the parameter was multiplied by, broadcastable to ``[N, K, *rest]``.
        shape: the parameter's shape.
        aligned: the parameter's shape as it stands in ``[K, *rest]``, 1 where it was broadcast.
    """

    def __init__(self, cotangent: Tensor, factor: Tensor, shape: Size, aligned: tuple[int, ...]):
        super().__init__(cotangent * factor, shape, aligned)
