"""A derived value that holds every sample's own part (copies of a token, initial states)."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from curvopt.axes.layout import Layout
from curvopt.structures.base import Structure


class Own(Structure):
    """Row n is the cotangent of sample n's part of the value, and zero in the other parts.

    Args:
        cotangent: ``[V, N, K, *rest]``.
        layout: where the value holds its samples.
        shape: the value's shape.
    """

    def __init__(self, cotangent: Tensor, layout: Layout, shape: Size):
        self.cotangent, self.layout, self.shape = cotangent, layout, shape
        self.columns, self.samples = cotangent.shape[:2]

    def rows(self, start: int, stop: int) -> Tensor:
        one_hot = torch.eye(self.samples, device="cpu")[start:stop].to(self.cotangent)
        one_hot = one_hot.view(*one_hot.shape, *[1] * (self.cotangent.ndim - 2))
        return self._merged(one_hot * self.cotangent.unsqueeze(1), 2)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        parts = self.cotangent.sum(0)
        if weights is not None:
            parts = parts * weights.view(-1, *[1] * (parts.ndim - 1))
        return self._merged(parts, 0)

    def _merged(self, parts: Tensor, lead: int) -> Tensor:
        return self.layout.merge(parts, lead, self.shape[: self.layout.axes])
