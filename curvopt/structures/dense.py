"""Rows that were formed already."""

from __future__ import annotations

import torch
from torch import Tensor

from curvopt.structures.base import Structure


class Dense(Structure):
    """Rows held as one tensor.

    Args:
        values: ``[V, N, *shape]``.
    """

    def __init__(self, values: Tensor):
        self.columns, self.samples = values.shape[:2]
        self.shape = values.shape[2:]
        self.values = values

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[:, start:stop]

    def form(self) -> Tensor:
        return self.values

    def sum(self, weights: Tensor | None = None) -> Tensor:
        values = self.values.sum(0) if self.columns > 1 else self.values[0]
        return values.sum(0) if weights is None else torch.tensordot(weights, values, 1)
