"""Rows that were formed already."""

from __future__ import annotations

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
